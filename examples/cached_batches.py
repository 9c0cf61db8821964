"""Train on contrastive batches that do not fit into memory: every pair a negative of every other, part by part.

    python examples/cached_batches.py

Adding up the gradients of four batches of 64 pairs is not the gradient of one batch of 256: each pair then meets 63
negatives, not 255. `CachedContrastive` gives the gradient of the 256, in the memory of 64.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mlip_kernels.nn import CachedContrastive, ClipLoss

PAIRS, PARTS, WIDTH = 256, 4, 64


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(96, 256), nn.GELU(), nn.Linear(256, WIDTH))
        self.text = nn.Sequential(nn.Linear(48, 256), nn.GELU(), nn.Linear(256, WIDTH))
        self.logit_scale = nn.Parameter(torch.tensor(2.66))

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        return *features, self.logit_scale.exp()


def gradient(model: nn.Module) -> torch.Tensor:
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return found


def main() -> None:
    torch.manual_seed(0)
    model, loss = Towers(), ClipLoss()
    images, texts = torch.randn(PAIRS, 96), torch.randn(PAIRS, 48)
    parts = list(zip(images.chunk(PARTS), texts.chunk(PARTS), strict=True))

    whole = loss(*model(images, texts))
    whole.backward()
    wanted = gradient(model)
    print(f"one batch of {PAIRS}:         loss {whole.item():.4f}")

    cached = CachedContrastive(model, loss).backward(parts)
    error = ((gradient(model) - wanted).norm() / wanted.norm()).item()
    print(f"{PARTS} cached parts:          loss {cached.item():.4f}, gradient differs by {error:.1e}")

    for part in parts:
        (loss(*model(*part)) / PARTS).backward()
    error = ((gradient(model) - wanted).norm() / wanted.norm()).item()
    print(f"{PARTS} batches, added up:                  gradient differs by {error:.1e}")


if __name__ == "__main__":
    main()
