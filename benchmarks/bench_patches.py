"""Image towers of open_clip and Hugging Face, patched and not: a training step, inference, and what the patch costs.

Half of the patch tokens merge over the blocks, as many in each; weights are random.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor, nn

open_clip = pytest.importorskip("open_clip", reason="needs open_clip: pip install open_clip_torch")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")

from mlip_kernels.patch import open_clip as patch_open_clip  # noqa: E402
from mlip_kernels.patch import transformers as patch_transformers  # noqa: E402

IMAGES, BLOCKS = 16, 12


def of_open_clip(patch_size: int) -> tuple[nn.Module, Any]:
    sizes = {"width": 768, "layers": BLOCKS, "heads": 12, "mlp_ratio": 4.0, "output_dim": 512}
    tower = open_clip.transformer.VisionTransformer(image_size=224, patch_size=patch_size, **sizes)
    return tower, patch_open_clip


def of_hugging_face() -> tuple[nn.Module, Any]:
    config = transformers.CLIPVisionConfig(patch_size=16, attn_implementation="sdpa")
    return transformers.CLIPVisionModel(config), patch_transformers


TOWERS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], int]] = {
    "open_clip ViT-B/32": (lambda: of_open_clip(32), 49),
    "open_clip ViT-B/16": (lambda: of_open_clip(16), 196),
    "Hugging Face CLIP ViT-B/16": (of_hugging_face, 196),
}


def tower(name: str, r: int | None) -> nn.Module:
    """A tower, patched if it is given an r."""
    torch.manual_seed(0)
    model, patch = TOWERS[name][0]()
    return model.to(DEVICE) if r is None else patch.apply(model.to(DEVICE), r)


def run(model: nn.Module, images: int, mode: str) -> Callable[[], None]:
    """Inference, or a step of SGD on the square of the features."""
    x = torch.randn(images, 3, 224, 224, device=DEVICE)

    def features() -> Tensor:
        found = model(x)
        return found if isinstance(found, Tensor) else found.pooler_output

    if mode == "inference":
        model.eval()
        return torch.no_grad()(features)
    optimizer = torch.optim.SGD(model.train().parameters(), 1e-3)

    def step() -> None:
        features().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("mode", ["training step", "inference"])
@pytest.mark.parametrize("name", TOWERS)
def test_half_of_the_tokens(benchmark, ratios, name, mode):
    r = round(TOWERS[name][1] / 2 / BLOCKS)
    benchmark.group = f"{name} with r={r}, {mode}, {IMAGES} images"
    ratios(run(tower(name, r), IMAGES, mode), {"unpatched": run(tower(name, None), IMAGES, mode)}, rounds=3)


@pytest.mark.parametrize("r", [0, 8])
@pytest.mark.parametrize("name", ["open_clip ViT-B/16", "Hugging Face CLIP ViT-B/16"])
def test_one_image(benchmark, ratios, name, r):
    """Where little is computed, the patch itself must not cost more than it saves."""
    benchmark.group = f"{name} with r={r}, inference, one image"
    ratios(run(tower(name, r), 1, "inference"), {"unpatched": run(tower(name, None), 1, "inference")}, rounds=15)
