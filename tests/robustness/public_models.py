"""Rows of the table of errors for the model and its configuration."""

from __future__ import annotations

import torch

from mlip_kernels.models import (
    MLIP,
    FrequencyConfig,
    ImageConfig,
    LossConfig,
    MergingConfig,
    MLIPConfig,
    MLIPLoss,
    Preprocessing,
    TextConfig,
)
from robustness.argument_kinds import LARGEST_SIZE, Choice, Flag, Instance, Integer, Kind, Number, Numbers, Tensors
from robustness.public_calls import PROBABILITY, SIZE, Call, batch_axes, constructor, floats, forward

FLAG, POSITIVE = Flag(), Number(0.0)
TINY = MLIPConfig(
    image=ImageConfig(image_size=16, patch_size=8, width=8, depth=2, heads=1),
    text=TextConfig(context_length=5, vocabulary=16, width=8, depth=1, heads=1),
    embed_dim=4,
)
MODEL = MLIP(TINY).eval()
IMAGES, TEXT = floats(2, 3, 16, 16), torch.tensor([[1, 2, 15, 0, 0], [1, 15, 0, 0, 0]])
FEATURES = MODEL(IMAGES, TEXT)

PICTURES = Tensors(same_dtype=True)
CAPTIONS = Tensors((torch.int64, torch.int32))
STEP = (3, Integer(0, optional=True))


def divisor(of: int) -> Kind:
    """What divides a size."""
    return Choices(tuple(size for size in range(1, of + 1) if of % size == 0))


class Choices(Kind):
    """An integer among some."""

    def __init__(self, integers: tuple[int, ...]) -> None:
        self.integers = integers

    def accepts(self, label: str, value: object) -> bool:
        return SIZE.accepts(label, value) and int(value) in self.integers


class Multiples(Kind):
    """A multiple of an integer."""

    def __init__(self, of: int) -> None:
        self.of = of

    def accepts(self, label: str, value: object) -> bool:
        return SIZE.accepts(label, value) and int(value) % self.of == 0


CALLS = {
    "ImageConfig": constructor(
        ImageConfig,
        image_size=(224, Multiples(16)),
        patch_size=(16, divisor(224)),
        width=(768, Multiples(12)),
        depth=(12, SIZE),
        heads=(12, divisor(768)),
        mlp_ratio=(4.0, Number(0.1, LARGEST_SIZE / 768)),
        drop_path=(0.0, Number(0.0, 0.99)),
        pool=("token", Choice(("token", "avg"))),
        pre_norm=(False, FLAG),
        norm_epsilon=(1e-6, POSITIVE),
        activation=("gelu", Choice(("gelu", "quick_gelu"))),
    ),
    "TextConfig": constructor(
        TextConfig,
        context_length=(77, SIZE),
        vocabulary=(100, SIZE),
        width=(512, Multiples(8)),
        depth=(12, SIZE),
        heads=(8, divisor(512)),
        activation=("gelu", Choice(("gelu", "quick_gelu"))),
    ),
    "FrequencyConfig": constructor(
        FrequencyConfig,
        depth=(2, SIZE),
        transform=("grid", Choice(("grid", "tokens"))),
        basis=("rfft", Choice(("rfft", "dct"))),
        mixer=("filter", Choice(("filter", "filter_bank", "complex_mlp", "none"))),
        filters=(4, SIZE),
        mlp_ratio=(4.0, Number(0.1, LARGEST_SIZE)),
        order=("parallel", Choice(("parallel", "sequential"))),
        fusion=("none", Choice(("none", "residual"))),
        representation=("tokens", Choice(("tokens", "amplitude"))),
        pool=("attention", Choice(("attention", "mean"))),
        text_transform=("none", Choice(("none", "rfft"))),
    ),
    "MergingConfig": constructor(
        MergingConfig,
        keep_rate=(0.7, Number(0.5, 1.0)),
        overall=(False, FLAG),
        layers=((0, 1), Numbers(Integer(0), None, lambda n: bool(n) and sorted(set(n)) == list(n), optional=True)),
        guide=("both", Choice(("none", "spatial", "frequency", "both"))),
        frequency_guide=("similarity", Choice(("similarity", "energy"))),
        energy_cutoff=(0.25, PROBABILITY),
        guide_weight=(1.0, POSITIVE),
        proportional_attention=(True, FLAG),
        granularity=("sizes", Choice(("sizes", "three_way"))),
        shares=((0.5, 0.3), Numbers(PROBABILITY, 2, lambda shares: sum(shares) <= 1)),
        warmup_steps=(0, Integer(0, LARGEST_SIZE)),
        test_keep_rate=(0.8, Number(0.5, 1.0, optional=True)),
    ),
    "LossConfig": constructor(
        LossConfig,
        frequency_weight=(0.5, POSITIVE),
        token_weight=(0.5, POSITIVE),
        token_domains=("separate", Choice(("separate", "union", "spatial", "frequency"))),
        consistency_weight=(0.5, POSITIVE),
        token_dim=(256, SIZE),
        text_tokens=("words", Choice(("words", "words_and_end", "all"))),
        weigh_by_size=(True, FLAG),
        temperature=(0.07, Number(0.01)),
    ),
    "MLIPConfig": constructor(
        MLIPConfig,
        image=(ImageConfig(), Instance()),
        text=(TextConfig(), Instance()),
        frequency=(FrequencyConfig(), Instance()),
        merging=(MergingConfig(), Instance()),
        loss=(LossConfig(), Instance()),
        embed_dim=(512, SIZE),
    ),
    "Preprocessing": constructor(
        Preprocessing,
        size=(224, SIZE),
        mean=((0.5, 0.5, 0.5), Numbers(Number(), 3)),
        std=((0.5, 0.5, 0.5), Numbers(Number(1e-6), 3)),
        interpolation=("bicubic", Choice(("bicubic", "bilinear"))),
        resize_mode=("shortest", Choice(("shortest", "longest", "squash"))),
        fill_color=(0, Integer(0, 255)),
    ),
    "MLIP": constructor(MLIP, config=(TINY, Instance()), preprocessing=(Preprocessing(16), Instance(optional=True))),
    "MLIP.forward": forward(MODEL, images=(IMAGES, PICTURES), text=(TEXT, CAPTIONS), step=STEP),
    "MLIP.encode_image": Call(
        MLIP.encode_image,
        {"images": (IMAGES, Tensors(same_dtype=True, free=batch_axes(0))), "normalize": (True, FLAG)},
        lambda: MODEL.encode_image,
    ),
    "MLIP.encode_text": Call(
        MLIP.encode_text,
        {"text": (TEXT, Tensors((torch.int64, torch.int32), free=batch_axes(0))), "normalize": (True, FLAG)},
        lambda: MODEL.encode_text,
    ),
    "MLIPLoss": constructor(
        MLIPLoss,
        config=(TINY.loss, Instance()),
        rank=(0, Integer(0, 0)),
        world_size=(1, SIZE),
        gather=("all", Choice(("all", "ring"))),
    ),
    "MLIPLoss.forward": forward(MLIPLoss(TINY.loss), features=(FEATURES, Instance())),
}
