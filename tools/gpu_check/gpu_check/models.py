"""Whole models: timm's ViT with merging and without, and steps of CLIP and MLIP."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import timm
import torch
from torch import nn

from gpu_check.clock import measure
from gpu_check.record import Recorder
from mlip_kernels.models import MLIP, MLIPConfig, MLIPLoss
from mlip_kernels.patch import timm as patch
from mlip_kernels.train.config import SMALL


def run(recorder: Recorder, device: torch.device) -> None:
    """Record seconds of inference and of training steps."""
    cuda = device.type == "cuda"
    name, batches = ("vit_base_patch16_224", (64, 256)) if cuda else ("vit_tiny_patch16_224", (2,))
    for batch in batches:
        for r in (None, 0, 13):
            for mode in ("inference", "training step"):
                label = f"{name}, {batch} images, {'unpatched' if r is None else f'r={r}'}, {mode}"
                with recorder.case(label, seconds=40) as facts:
                    model = timm.create_model(name).to(device)
                    model = model if r is None else patch.apply(model, r)
                    call = _vit(model, batch, device, training=mode == "training step")
                    call()
                    facts |= measure(call, device, repetitions=10 if cuda else 3)._asdict()
    tower = dataclasses.replace(SMALL.image, image_size=112, width=384, depth=12, heads=6)
    merged = dataclasses.replace(SMALL, image=tower, merging=dataclasses.replace(SMALL.merging, keep_rate=0.7))
    whole = dataclasses.replace(merged, merging=dataclasses.replace(merged.merging, keep_rate=1.0))
    for label, config in {"CLIP": merged.clip(), "MLIP": whole, "MLIP, keep_rate 0.7": merged}.items():
        for pairs in (256, 1024) if cuda else (4,):
            with recorder.case(f"{label}, training step, {pairs} pairs", seconds=40) as facts:
                call = _step(config, pairs, device)
                call()
                facts |= measure(call, device, repetitions=10 if cuda else 3)._asdict()


def _vit(model: nn.Module, batch: int, device: torch.device, *, training: bool) -> Callable[[], object]:
    x = torch.randn(batch, 3, 224, 224, device=device)
    model.train(training)

    def step() -> object:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(x).float().square().mean()
        if training:
            loss.backward()
            model.zero_grad()
        return loss

    return step if training else torch.no_grad()(step)


def _step(config: MLIPConfig, pairs: int, device: torch.device) -> Callable[[], object]:
    torch.manual_seed(0)
    model, loss = MLIP(config).to(device), MLIPLoss(config.loss)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    side = config.image.image_size
    images = torch.randn(pairs, 3, side, side, device=device)
    text = torch.randint(1, 400, (pairs, config.text.context_length), device=device)
    text[:, 0], text[:, 8], text[:, 9:] = 49406, 49407, 0

    def step() -> object:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            terms = loss(model(images, text))
        terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        return terms["loss"]

    return step
