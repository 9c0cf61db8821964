"""Draw docs/figures/merged_tokens.png: photographs, and which of their patches merge by similarity.

    python benchmarks/draw_merged_tokens.py    # the photographs of scikit-image, if it is installed
    python benchmarks/draw_merged_tokens.py --output mine.png photograph.jpg ...

No trained model takes part. Every patch of 8 x 8 pixels is a token; its metric is its low-frequency cosine spectrum,
and the high-frequency energy of the image at the patch guides the merging: detail merges last. scikit-image's
photographs are in the public domain (astronaut: NASA) or under CC0 (coffee: Rachel Michetti, chelsea: Stefan van der
Walt).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mlip_kernels import dct, keep_rate_schedule, merge_plan, token_energy
from mlip_kernels.nn.guidance import rank
from mlip_kernels.visualization import painted

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
SIDE, PATCH = 224, 8
GRID = (SIDE // PATCH, SIDE // PATCH)
SHARES = {0.25: 8, 0.1: 12}
"""Share of the tokens that is left -> rounds of merging."""
GUIDE_WEIGHT = 0.3
LOW_FREQUENCIES = 4
COLOURS = 64  # of the palette, which keeps the file small


def sample_photographs() -> list[Image.Image]:
    """Those that come with scikit-image."""
    from skimage import data

    return [Image.fromarray(picture()) for picture in (data.astronaut, data.coffee, data.chelsea)]


def tokens_of(images: Tensor) -> tuple[Tensor, Tensor]:
    """What the tokens of ``images [B, 3, SIDE, SIDE]`` in [0, 1] are matched by, and their energy as a guide."""
    batch, count = images.shape[0], GRID[0] * GRID[1]
    patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1)
    patches = patches.reshape(batch, count, PATCH * PATCH * 3) * 2 - 1
    spectrum = dct(patches.reshape(batch * count, PATCH * PATCH, 3), grid=(PATCH, PATCH)) / PATCH
    low = spectrum.unflatten(1, (PATCH, PATCH))[:, :LOW_FREQUENCIES, :LOW_FREQUENCIES].reshape(batch, count, -1)
    constant = low.new_full((batch, count, 1), 0.5)  # tells dark patches from bright ones of the same colour
    return torch.cat((low, constant), dim=2), token_energy(patches, 0.25, grid=GRID)


def merged_origin(metric: Tensor, energy: Tensor, share: float, rounds: int) -> Tensor:
    """The token that every patch is in after merging, ``[B, H·W]``."""
    origin, size = None, None
    for r in keep_rate_schedule(share, metric.shape[1], rounds, layers=range(rounds), overall=True):
        plan = merge_plan(metric, r, size=size, guide=rank(energy), guide_weight=GUIDE_WEIGHT, prefix_tokens=0)
        energy = plan.merge(energy[..., None])[0][..., 0]
        metric, size = plan.merge(metric)
        origin = plan.track(origin)
    return origin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", nargs="*", type=Path)
    parser.add_argument("--output", type=Path, default=FIGURES / "merged_tokens.png")
    arguments = parser.parse_args()
    photographs = [Image.open(path) for path in arguments.photographs] or sample_photographs()
    fitted = [ImageOps.fit(photograph.convert("RGB"), (SIDE, SIDE)) for photograph in photographs]
    images = torch.stack([torch.from_numpy(np.array(picture)) for picture in fitted]).permute(0, 3, 1, 2) / 255
    metric, energy = tokens_of(images)
    rows = [images]
    for share, rounds in SHARES.items():
        origin = merged_origin(metric, energy, share, rounds)
        rows.append(painted(images, origin, GRID))
        print(f"{GRID[0] * GRID[1]} patches, {int(origin.max()) + 1} tokens")
    picture = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
    arguments.output.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).quantize(COLOURS, dither=Image.Dither.NONE).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
