"""A GFNet-style network: filters over the patch grid take the place of attention.

    python examples/spectral_filter_layer.py

Trained to tell horizontal from vertical and diagonal stripes of random frequency and phase, which a filter sees well.
The layer loads GFNet's checkpoints (`complex_weight`), equals `torch.fft`, and works on another grid.
"""

import math

import torch
from torch import Tensor, nn

from mlip_kernels.nn import AttentionPool, SpectralFilter

GRID, DIM, STEPS = (8, 8), 32, 60


class Block(nn.Module):
    """``x + MLP(norm(filter(norm(x))))``, the block of GFNet."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Sequential(nn.LayerNorm(DIM), SpectralFilter(DIM, GRID), nn.LayerNorm(DIM))
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.filter(x))


def stripes(count: int) -> tuple[Tensor, Tensor]:
    """Noisy 32 x 32 pictures as patches of 4 x 4 ``[count, 64, 16]``, and which way their stripes run."""
    label = torch.randint(3, (count,))
    angle = label[:, None, None] * math.pi / 4
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    frequency, phase = 0.4 + torch.rand(count, 1, 1), 6.3 * torch.rand(count, 1, 1)
    picture = torch.sin(frequency * (x * angle.sin() + y * angle.cos()) + phase) + 2 * torch.randn(count, 32, 32)
    return picture.reshape(count, 8, 4, 8, 4).permute(0, 1, 3, 2, 4).reshape(count, 64, 16), label


def main() -> None:
    torch.manual_seed(0)
    layer, tokens = SpectralFilter(DIM, GRID), torch.randn(2, 64, DIM)
    spectrum = torch.fft.rfft2(tokens.reshape(2, *GRID, DIM), dim=(1, 2), norm="ortho")
    filtered = torch.fft.irfft2(spectrum * torch.view_as_complex(layer.complex_weight), GRID, (1, 2), "ortho")
    torch.testing.assert_close(layer(tokens), filtered.reshape(2, 64, DIM), rtol=1e-4, atol=1e-5)
    print("SpectralFilter equals irfft2(weight * rfft2(x))")

    body, pool, head = nn.Sequential(nn.Linear(16, DIM), Block(), Block()), AttentionPool(DIM), nn.Linear(DIM, 3)
    parameters = [*body.parameters(), *pool.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for step in range(STEPS + 1):
        patches, label = stripes(64)
        logits = head(pool(body(patches)))
        if step % 20 == 0:
            print(f"step {step:2}: {(logits.argmax(1) == label).float().mean():.0%} of unseen pictures right")
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, label).backward()
        optimizer.step()

    larger = layer(torch.randn(2, 12 * 12, DIM), grid=(12, 12))
    print(f"the same weight on a 12 x 12 grid: {list(larger.shape)}")


if __name__ == "__main__":
    main()
