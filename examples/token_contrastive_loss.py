"""Train two towers of your own on single tokens: captions that name parts of a picture find it.

    python examples/token_contrastive_loss.py

Each "picture" is a grid of patches, a few of which show one of 40 things; its "caption" names these things in another
order, padded. Nothing says which patch belongs to which word: `TokenContrastiveLoss` finds out, since for every token
only its best counterpart counts. `text_mask` keeps padding out of it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mlip_kernels as mk
from mlip_kernels.nn import TokenContrastiveLoss

THINGS, PATCHES, WORDS, DIM, STEPS = 40, 16, 6, 32, 60
LOOKS = torch.randn(THINGS, 24, generator=torch.Generator().manual_seed(0))  # what a thing looks like in a patch


def pairs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Patches ``[B, 16, 24]``, words ``[B, 6]`` and which of them are real ``[B, 6]``; captions have 2 to 6 words."""
    words = torch.rand(count, THINGS).argsort(1)[:, :WORDS]
    mask = torch.arange(WORDS) < torch.randint(2, WORDS + 1, (count, 1))
    places = torch.rand(count, PATCHES).argsort(1)[:, :WORDS]
    shown = torch.where(mask[..., None], LOOKS[words], 0.0)
    patches = 0.5 * torch.randn(count, PATCHES, LOOKS.shape[1])
    return patches.scatter_add(1, places[..., None].expand_as(shown), shown), words, mask


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(LOOKS.shape[1], 64), nn.GELU(), nn.Linear(64, DIM))
        self.text = nn.Embedding(THINGS, DIM)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, patches: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(self.image(patches), dim=-1), F.normalize(self.text(words), dim=-1), self.log_scale.exp()


@torch.no_grad()
def recall(towers: Towers, count: int = 200) -> str:
    patches, words, mask = pairs(count)
    images, texts, _ = towers(patches, words)
    matching = torch.arange(count)
    found = [(logits.argmax(1) == matching).float().mean() for logits in mk.token_logits(images, texts, text_mask=mask)]
    return f"recall@1 among {count}: image to text {found[0]:.1%}, text to image {found[1]:.1%}"


def main() -> None:
    torch.manual_seed(0)
    towers, loss = Towers(), TokenContrastiveLoss()
    optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-2)
    print(f"before   {recall(towers)}")
    for step in range(STEPS + 1):
        patches, words, mask = pairs(64)
        images, texts, scale = towers(patches, words)
        value = loss(images, texts, scale, text_mask=mask)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:2}  loss {value.item():.2f}")
    print(f"after    {recall(towers)}")


if __name__ == "__main__":
    main()
