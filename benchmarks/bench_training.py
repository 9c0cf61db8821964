"""What token merging is worth end to end: training steps of CLIP and of MLIP, and timm's ViT-S with and without it.

CLIP, MLIP without merging and MLIP with merging take turns in one run. Their image tower has the width, depth and token
count of ViT-S/16 at 224 pixels (here: patches of 8 in 112), the rest is the trainer's ``small`` preset, so that the
share of the image tower is that of a real model: merging cannot speed up the text tower, the Frequency Stage or the
optimiser. timm's ViT-S/16 is compared with itself, patched, and with merging as ToMe has it: attention written out, and
merging by torch's own functions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import timm
import torch
from conftest import DEVICE, synchronize, take_turns

from mlip_kernels import use_reference
from mlip_kernels.models import MLIP, MLIPConfig, MLIPLoss
from mlip_kernels.patch import timm as patch
from mlip_kernels.patch import tome
from mlip_kernels.train import precision
from mlip_kernels.train.config import SMALL

PAIRS = 16
ROUNDS = 3

MERGED = dataclasses.replace(
    SMALL,
    image=dataclasses.replace(SMALL.image, image_size=112, width=384, depth=12, heads=6),
    merging=dataclasses.replace(SMALL.merging, keep_rate=0.7),
)
UNMERGED = dataclasses.replace(MERGED, merging=dataclasses.replace(MERGED.merging, keep_rate=1.0))
MODELS = {"clip": MERGED.clip(), "mlip": UNMERGED, "mlip, keep_rate 0.7": MERGED}


def training_step(config: MLIPConfig) -> Callable[[], None]:
    """Forward, loss, backward and AdamW of a fresh model, as the trainer runs them, in the precision it would take."""
    torch.manual_seed(0)
    model, loss = MLIP(config).to(DEVICE), MLIPLoss(config.loss)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    side = config.image.image_size
    images = torch.randn(PAIRS, 3, side, side, device=DEVICE)
    text = torch.randint(1, 400, (PAIRS, config.text.context_length), device=DEVICE)
    text[:, 0], text[:, 8], text[:, 9:] = 49406, 49407, 0
    autocast = precision.resolve("auto", DEVICE).autocast(DEVICE)

    def step() -> None:
        with autocast:
            terms = loss(model(images, text))
        terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()

    return step


@pytest.fixture(scope="module")
def best() -> dict[str, float]:
    """Shortest seconds of a step of every model."""
    return take_turns({name: training_step(config) for name, config in MODELS.items()}, ROUNDS)


@pytest.mark.parametrize("name", MODELS)
def test_training_step(benchmark, best, name):
    benchmark.group = f"training step, {PAIRS} pairs"
    benchmark.extra_info["precision"] = precision.resolve("auto", DEVICE).name
    benchmark.extra_info["pairs/s"] = round(PAIRS / best[name], 2)
    for other in MODELS:
        if other != name:
            benchmark.extra_info[f"{other} / this"] = round(best[other] / best[name], 3)
    benchmark.pedantic(training_step(MODELS[name]), rounds=2, warmup_rounds=1)


IMAGES, R = 16, 13


def vit(r: int | None = None) -> torch.nn.Module:
    """ViT-S/16 of timm, patched if it is given an r."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224").to(DEVICE)
    return model if r is None else patch.apply(model, r)


def as_tome_does(r: int) -> torch.nn.Module:
    """ViT-S/16 with merging as it is published, written in plain PyTorch: attention is not fused, sizes are a state."""
    model, state = vit(), {}
    model.register_forward_pre_hook(lambda *_: state.clear())
    for block in model.blocks:
        block.forward = functools.partial(_tome_block, block, state, r)
    return model


def _tome_block(block: torch.nn.Module, state: dict[str, torch.Tensor], r: int, x: torch.Tensor) -> torch.Tensor:
    attention = block.attn
    qkv = attention.qkv(block.norm1(x)).unflatten(2, (3, attention.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q * attention.scale) @ k.transpose(-2, -1)
    size = state.get("size")
    if size is not None:
        scores = scores + size.log()[:, None, None, :, 0]
    x = x + attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    with use_reference():
        merge, _ = tome.merge.bipartite_soft_matching(k.mean(1).detach(), r, class_token=True)
    size = torch.ones_like(x[..., :1]) if size is None else size
    state["size"] = merge(size, mode="sum")
    x = merge(x * size, mode="sum") / state["size"]
    return x + block.mlp(block.norm2(x))


def run(model: torch.nn.Module, images: int, mode: str) -> Callable[[], None]:
    """Inference, or a step of SGD on cross entropy."""
    x, labels = torch.randn(images, 3, 224, 224, device=DEVICE), torch.randint(1000, (images,), device=DEVICE)
    if mode == "inference":
        return torch.no_grad()(lambda: model.eval()(x))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> None:
        torch.nn.functional.cross_entropy(model.train()(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("mode", ["training step", "inference"])
def test_timm(benchmark, ratios, mode):
    benchmark.group = f"timm's ViT-S/16 with r={R}, {mode}, {IMAGES} images"
    others = {"unpatched": vit(), "as ToMe does": as_tome_does(R)}
    others = {name: run(model, IMAGES, mode) for name, model in others.items()}
    ratios(run(vit(R), IMAGES, mode), others, rounds=3)


@pytest.mark.parametrize("r", [0, R])
def test_timm_with_one_image(benchmark, ratios, r):
    """Where little is computed, the patch itself must not cost more than it saves."""
    benchmark.group = f"timm's ViT-S/16 with r={r}, inference, one image"
    others = {"unpatched": run(vit(), 1, "inference"), "as ToMe does": run(as_tome_does(r), 1, "inference")}
    ratios(run(vit(r), 1, "inference"), others, rounds=30)
