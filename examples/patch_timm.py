"""Patch a timm vision transformer so that it merges tokens: how much faster it gets, and what changes.

    python examples/patch_timm.py

`apply` changes a model in place and `remove` gives it back. Weights are random here, so only speed and the size of the
change mean something; give `timm.create_model` `pretrained=True` to see predictions that matter.
"""

import time

import timm
import torch

import mlip_kernels as mk
from mlip_kernels.patch import timm as patch

IMAGES, TURNS = 4, 2


def seconds(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Shortest of a few turns."""
    best = float("inf")
    for _ in range(TURNS):
        start = time.perf_counter()
        model(images)
        best = min(best, time.perf_counter() - start)
    return best


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    images = torch.rand(IMAGES, 3, 224, 224)
    before, unpatched = model(images), seconds(model, images)
    print(f"unpatched:      {IMAGES / unpatched:6.1f} images/s, 196 patch tokens in every block")

    for r in (8, 13):
        patch.apply(model, r=r)
        after = model(images)
        difference = ((after - before).norm() / before.norm()).item()
        left = mk.token_counts(mk.merge_schedule(r, depth=12), tokens=196)[-1]
        speed = IMAGES / seconds(model, images)
        print(f"apply(r={r:2}):    {speed:6.1f} images/s, {left:3} tokens left, outputs differ by {difference:.1%}")

    patch.set_merging(model, guide="frequency", energy_cutoff=0.25)
    print(f"with a guide:   {IMAGES / seconds(model, images):6.1f} images/s; tokens with fine detail merge last")

    patch.remove(model)
    torch.testing.assert_close(model(images), before)
    print("remove(model):  the outputs of before")


if __name__ == "__main__":
    main()
