"""One training step of CLIP, of MLIP without merging, and of MLIP with merging, interleaved in one run.

The image tower has the width, depth and token count of ViT-S/16 at 224 pixels (here: patches of 8 in 112), the rest is
the trainer's ``small`` preset, so that the share of the image tower is that of a real model: merging cannot speed up
the text tower, the Frequency Stage or the optimiser.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from conftest import DEVICE, synchronize, take_turns

from mlip_kernels.models import MLIP, MLIPConfig, MLIPLoss
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
    """Forward, loss, backward and AdamW of a fresh model, as the trainer runs them."""
    torch.manual_seed(0)
    model, loss = MLIP(config).to(DEVICE), MLIPLoss(config.loss)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    side = config.image.image_size
    images = torch.randn(PAIRS, 3, side, side, device=DEVICE)
    text = torch.randint(1, 400, (PAIRS, config.text.context_length), device=DEVICE)
    text[:, 0], text[:, 8], text[:, 9:] = 49406, 49407, 0

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
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
    benchmark.extra_info["pairs/s"] = round(PAIRS / best[name], 2)
    for other in MODELS:
        if other != name:
            benchmark.extra_info[f"{other} / this"] = round(best[other] / best[name], 3)
    benchmark.pedantic(training_step(MODELS[name]), rounds=2, warmup_rounds=1)
