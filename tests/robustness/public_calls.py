"""One valid call of every public function, method and constructor, and what each of its arguments has to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import mlip_kernels as mk
from mlip_kernels import nn as modules
from mlip_kernels.nn import spectral
from mlip_kernels.nn.granularity import three_way_plan
from robustness.argument_kinds import (
    FLOATING,
    INTEGERS,
    LARGEST_SIZE,
    Choice,
    Flag,
    Instance,
    Integer,
    Kind,
    Number,
    Numbers,
    Rate,
    Scalar,
    Tensors,
)

COUNTS = (*FLOATING, *INTEGERS)
MASKS = (torch.bool, *INTEGERS)
SIZE = Integer(1, LARGEST_SIZE)
FLAG, NUMBER, PROBABILITY = Flag(), Number(), Number(0.0, 1.0)


@dataclass(frozen=True)
class Call:
    """A call that works, as small as it can be."""

    function: Callable[..., Any]
    arguments: dict[str, tuple[Any, Kind]]
    """Every argument by name: a valid value, and what it has to be."""
    make: Callable[[], Callable[..., Any]] | None = None
    """What makes the function to call, where it is a method: `function` tells its signature only."""

    def __call__(self, **changed: Any) -> Any:
        function = self.function if self.make is None else self.make()
        return function(**{**{name: value for name, (value, _) in self.arguments.items()}, **changed})


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


def grid(tokens: int | None, *, optional: bool) -> Kind:
    def fits(pair: Sequence[int]) -> bool:
        return pair[0] * pair[1] in ([tokens] if tokens else range(LARGEST_SIZE + 1))

    return Numbers(SIZE, 2, fits, optional=optional, wrong=((0, 6), (6, 0), (2**31 - 1, 2**31 - 1), (2, 3, 1)))


def batch_axes(*axes: int, meta: bool = False) -> tuple[str, ...]:
    """Labels of tensors that are longer or shorter along axes on which nothing else depends."""
    changed = [f"{change} along {axis}" for axis in axes for change in ("longer", "shorter")]
    return (*changed, *(["nothing along 0"] if 0 in axes else []), *(["meta"] if meta else []))


X, SIZES, KEEP = floats(2, 6, 4), torch.full((2, 6), 2.0), torch.ones(2, 6, dtype=torch.bool)
PLAN = mk.merge_plan(X, 2)

ALONE = Tensors(free=batch_axes(0, 2, meta=True))
OUT = (None, Tensors(optional=True, same_dtype=True, gradient=False))
GRID, PREFIX = ((2, 3), grid(6, optional=True)), (0, Integer(0, 0))
NORM = ("ortho", Choice(("ortho", "backward", "forward", None)))
SPECTRAL = {"grid": GRID, "prefix_tokens": PREFIX}
BASES = Choice(("dct", "rfft"))
DCT = {"x": (X, ALONE), "type": (2, Integer(1, 4)), "dim": (1, Integer(1, 1)), **SPECTRAL, "norm": NORM, "out": OUT}

COUNT = Tensors(COUNTS, optional=True, gradient=False)
MASK = Tensors(MASKS, optional=True)
WEIGHT = Tensors(optional=True)
MERGING = {
    "metric": (X, Tensors(free=batch_axes(2))),
    "r": (2, Integer(0)),
    "size": (SIZES, COUNT),
    "guide": (floats(2, 6), WEIGHT),
    "guide_weight": (0.5, NUMBER),
    "prefix_tokens": (1, Integer(0, 6)),
    "mask": (KEEP, MASK),
    "max_merges": (1, Integer(1, optional=True)),
    "threshold": (0.5, Number(-1.0, 1.0, optional=True)),
}
LAYERS = Numbers(Integer(0, 11), None, lambda layers: sorted(set(layers)) == list(layers), optional=True)

Q, K, V = floats(2, 2, 3, 4), floats(2, 2, 5, 4), floats(2, 2, 5, 6)
WORDS = floats(3, 5, 4)
LOGITS = floats(3, 3)
TOKEN_SIDES = {
    "image_mask": (KEEP, MASK),
    "text_mask": (torch.ones(3, 5, dtype=torch.bool), MASK),
    "image_weight": (SIZES, WEIGHT),
    "text_weight": (torch.ones(3, 5), WEIGHT),
}

FUNCTIONS = {
    "dct": Call(mk.dct, DCT),
    "idct": Call(mk.idct, DCT),
    "rfft": Call(mk.rfft, {"x": (X, ALONE), **SPECTRAL, "norm": NORM, "out": (None, Instance(optional=True))}),
    "irfft": Call(
        mk.irfft,
        {
            "real": (floats(2, 4, 4), Tensors(free=(), same_dtype=True)),
            "imag": (floats(2, 4, 4), Tensors(same_dtype=True)),
            "n": (6, Integer(6, 7, optional=True)),
            "grid": (None, Numbers(SIZE, 2, lambda pair: False, optional=True)),
            "norm": NORM,
            "out": OUT,
        },
    ),
    "spectral_filter": Call(
        mk.spectral_filter,
        {
            "x": (X, Tensors(free=batch_axes(0))),
            "weight": (floats(2, 2, 4, 2), Tensors()),
            "grid": ((2, 3), grid(6, optional=False)),
            "prefix_tokens": PREFIX,
            "basis": ("rfft", Choice(("rfft",))),
            "norm": NORM,
            "out": OUT,
        },
    ),
    "spectral_resize": Call(
        mk.spectral_resize,
        {
            "x": (X, ALONE),
            "grid": ((2, 3), grid(6, optional=False)),
            "new_grid": ((3, 3), grid(None, optional=False)),
            "rescale": (True, FLAG),
            "prefix_tokens": PREFIX,
            "out": OUT,
        },
    ),
    "band_energy": Call(
        mk.band_energy, {"x": (X, ALONE), "bands": (3, Integer(1, 2**30 // 6)), **SPECTRAL, "basis": ("dct", BASES)}
    ),
    "band_energy, bands of coefficients": Call(
        mk.band_energy,
        {
            "x": (X, Tensors(free=batch_axes(0, 2, meta=True))),
            "bands": (torch.arange(6).reshape(2, 3), Tensors(INTEGERS, single=Integer(1, 2**30 // 6))),
            "grid": ((2, 3), grid(6, optional=False)),
            "prefix_tokens": PREFIX,
            "basis": ("dct", Choice(("dct",))),
        },
    ),
    "token_energy": Call(
        mk.token_energy, {"x": (X, ALONE), "cutoff": (0.5, PROBABILITY), **SPECTRAL, "basis": ("dct", BASES)}
    ),
    "amplitude_phase": Call(mk.amplitude_phase, {"x": (X, ALONE), **SPECTRAL, "eps": (1e-6, Number(0.0))}),
    "merge_plan": Call(mk.merge_plan, MERGING),
    "merge_tokens": Call(mk.merge_tokens, {"x": (floats(2, 6, 3), Tensors(free=batch_axes(2))), **MERGING}),
    "weighted_mean": Call(
        mk.weighted_mean,
        {
            "x": (X, Tensors(free=batch_axes(2))),
            "weight": (SIZES, WEIGHT),
            "prefix_tokens": (1, Integer(0, 5)),
        },
    ),
    "proportional_attention": Call(
        mk.proportional_attention,
        {
            "q": (Q, Tensors(free=(*batch_axes(2), "nothing along 2"), same_dtype=True)),
            "k": (K, Tensors(same_dtype=True)),
            "v": (V, Tensors(free=(*batch_axes(3), "nothing along 3"), same_dtype=True)),
            "size": (torch.ones(2, 5), COUNT),
            "scale": (0.5, Number(optional=True)),
            "dropout_p": (0.0, PROBABILITY),
            "padding": (True, FLAG),
        },
    ),
    "token_logits": Call(
        mk.token_logits,
        {
            "image_tokens": (X, Tensors(same_dtype=True)),
            "text_tokens": (WORDS, Tensors(same_dtype=True)),
            **TOKEN_SIDES,
            "scale": (2.0, Scalar()),
            "bias": (0.5, Scalar(optional=True)),
        },
    ),
    "pair_cross_entropy": Call(
        mk.pair_cross_entropy,
        {
            "logits": (LOGITS, Tensors()),
            "labels": (torch.arange(3), Tensors((torch.int64,), optional=True)),
            "directions": ("both", Choice(("both", "rows"))),
            "label_smoothing": (0.1, PROBABILITY),
            "reduction": ("mean", Choice(("mean", "sum"))),
        },
    ),
    "merge_layers": Call(mk.merge_layers, {"depth": (12, SIZE)}),
    "keep_rate_schedule": Call(
        mk.keep_rate_schedule,
        {
            "keep_rate": (0.7, Number(0.5, 1.0)),
            "tokens": (196, SIZE),
            "depth": (12, SIZE),
            "layers": (None, LAYERS),
            "overall": (False, FLAG),
        },
    ),
    "merge_schedule": Call(mk.merge_schedule, {"r": (8, Rate()), "depth": (12, SIZE)}),
    "merge_schedule, rising": Call(mk.merge_schedule, {"r": ((8, 0.5), Rate()), "depth": (12, SIZE)}),
    "token_counts": Call(
        mk.token_counts, {"schedule": ([8, 8], Numbers(Integer(0))), "tokens": (196, Integer(0, LARGEST_SIZE))}
    ),
    "three_way_plan": Call(
        three_way_plan,
        {
            "metric": (X, Tensors(free=batch_axes(2))),
            "guide": (floats(2, 6), Tensors()),
            "shares": ((0.5, 0.3), Numbers(PROBABILITY, 2, lambda shares: sum(shares) <= 1, wrong=((0.6, 0.5),))),
            "prefix_tokens": (1, Integer(0, 6)),
            "size": (SIZES, COUNT),
        },
    ),
}

ANY_WIDTH = Tensors(free=(*batch_axes(2), "nothing along 2"))
PLANS = {
    "MergePlan.merge": Call(mk.MergePlan.merge, {"x": (X, ANY_WIDTH), "size": (SIZES, COUNT)}, lambda: PLAN.merge),
    "MergePlan.unmerge": Call(mk.MergePlan.unmerge, {"y": (floats(2, 4, 4), ANY_WIDTH)}, lambda: PLAN.unmerge),
    "MergePlan.track": Call(
        mk.MergePlan.track,
        {"origin": (PLAN.assignment, Tensors((torch.int64,), optional=True, free=(*batch_axes(1), "nothing along 1")))},
        lambda: PLAN.track,
    ),
    "MergePlan.then": Call(
        mk.MergePlan.then, {"plan": (mk.merge_plan(floats(2, 4, 4), 1), Instance())}, lambda: PLAN.then
    ),
    "MergePlan.original_order": Call(mk.MergePlan.original_order, {}, lambda: PLAN.original_order),
    "MergePlan.in_original_order": Call(mk.MergePlan.in_original_order, {}, lambda: PLAN.in_original_order),
}


def constructor(kind: type[nn.Module], **arguments: tuple[Any, Kind]) -> Call:
    return Call(kind, arguments)


def forward(module: nn.Module, **arguments: tuple[Any, Kind]) -> Call:
    return Call(type(module).forward, arguments, lambda: module)


RANKS = {"rank": (0, Integer(0, 0)), "world_size": (1, SIZE)}
CLIP = {
    "local_loss": (False, FLAG),
    "gather_with_grad": (False, FLAG),
    "cache_labels": (False, FLAG),
    **RANKS,
    "use_horovod": (False, Flag((False,))),
    "label_smoothing": (0.1, PROBABILITY),
}
FEATURES = Tensors(same_dtype=True)
SCALARS = {"logit_scale": (2.0, Scalar()), "logit_bias": (0.5, Scalar(optional=True)), "output_dict": (False, FLAG)}
SIDES = {"image_features": (LOGITS, FEATURES), "text_features": (LOGITS, FEATURES)}
MODULE_TOKENS = Tensors(free=batch_axes(0), same_dtype=True)
GRID_23 = ((2, 3), grid(None, optional=False))
MODULES = {
    "AttentionPool": constructor(modules.AttentionPool, dim=(4, SIZE)),
    "AttentionPool.forward": forward(modules.AttentionPool(4), x=(X, Tensors()), weight=(SIZES, WEIGHT)),
    "ClipLoss": constructor(modules.ClipLoss, **CLIP),
    "ClipLoss.forward": forward(modules.ClipLoss(), **SIDES, **SCALARS),
    "SigLipLoss": constructor(
        modules.SigLipLoss,
        cache_labels=(False, FLAG),
        **RANKS,
        dist_impl=("bidir", Choice((None, "bidir", "shift", "reduce", "gather"))),
    ),
    "SigLipLoss.forward": forward(modules.SigLipLoss(), **SIDES, **SCALARS),
    "TokenContrastiveLoss": constructor(modules.TokenContrastiveLoss, **CLIP, gather=("all", Choice(("all", "ring")))),
    "TokenContrastiveLoss.forward": forward(
        modules.TokenContrastiveLoss(),
        image_tokens=(X, Tensors(same_dtype=True, free=batch_axes())),
        text_tokens=(WORDS[:2], Tensors(same_dtype=True)),
        **{
            **TOKEN_SIDES,
            "text_mask": (torch.ones(2, 5, dtype=torch.bool), MASK),
            "text_weight": (torch.ones(2, 5), WEIGHT),
        },
        **SCALARS,
    ),
    "SpectralFilter": constructor(
        modules.SpectralFilter,
        dim=(4, SIZE),
        grid=((2, 3), Numbers(SIZE, 2, single=SIZE)),
        basis=("rfft", Choice(("rfft", "dct"))),
        prefix_tokens=(0, Integer(0, LARGEST_SIZE)),
    ),
    "SpectralFilter.forward": forward(
        modules.SpectralFilter(4, (2, 3)),
        x=(X, Tensors(free=batch_axes(0))),
        grid=((2, 3), grid(6, optional=True)),
    ),
    "resample_filter": Call(
        spectral.resample_filter,
        {
            "weight": (floats(2, 2, 4, 2), Tensors(free=(*batch_axes(2, meta=True), "nothing along 2"))),
            "grid": ((2, 3), Numbers(SIZE, 2, lambda pair: tuple(pair) in ((2, 2), (2, 3)))),
            "new_grid": ((3, 3), grid(None, optional=False)),
            "basis": ("rfft", Choice(("rfft",))),
        },
    ),
    "FrequencyStage": constructor(
        modules.FrequencyStage,
        dim=(4, SIZE),
        grid=GRID_23,
        depth=(1, SIZE),
        transform=("grid", Choice(("grid", "tokens"))),
        basis=("rfft", Choice(("rfft", "dct"))),
        mlp_ratio=(2.0, Number(0.0, LARGEST_SIZE / 4)),
        mixer=("filter", Choice(("filter", "filter_bank", "complex_mlp", "none"))),
        filters=(2, SIZE),
    ),
    "FrequencyStage.forward": forward(
        modules.FrequencyStage(4, (2, 3), 1),
        x=(X, MODULE_TOKENS),
        grid=((2, 3), grid(6, optional=True)),
    ),
    "FilterBank": constructor(spectral.FilterBank, dim=(4, SIZE), grid=GRID_23, filters=(2, SIZE)),
    "FilterBank.forward": forward(spectral.FilterBank(4, (2, 3), 2), x=(X, MODULE_TOKENS)),
    "ComplexMLP": constructor(spectral.ComplexMLP, dim=(4, SIZE), grid=GRID_23),
    "ComplexMLP.forward": forward(spectral.ComplexMLP(4, (2, 3)), x=(X, MODULE_TOKENS)),
}

CALLS = FUNCTIONS | PLANS | MODULES
