"""Invalid arguments: every argument of every public function, and every kind of value that it cannot have."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mlip_kernels as mk

X = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
HEADS = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))
MASK = torch.ones(2, 12, dtype=torch.bool)
SIZE = torch.ones(2, 12)
LOGITS = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
PLAN = mk.merge_plan(X, 3)


class Wrong:
    """An object of no type that anybody expects."""

    def __repr__(self) -> str:
        return "Wrong()"


def tensors(valid: Tensor, *, optional: bool = False, integers: bool = False, alone: bool = False) -> list[Any]:
    """What a tensor argument refuses: other objects, dtypes, layouts, devices and numbers of dimensions."""
    values: list[Any] = ["text", 3.5, [1.0, 2.0], Wrong(), valid.numpy(), valid[0], valid[None], valid + 0j]
    values += [valid.to_sparse(), torch.nested.nested_tensor([valid[0], valid[1]])]
    values += [] if optional else [None]
    values += [] if integers else [valid.to(torch.int8), valid.bool()]
    values += [] if alone else [valid.to("meta"), valid[:, :-1], torch.cat((valid, valid))]
    return values


def tokens(valid: Tensor, *, alone: bool = True) -> list[Any]:
    return [*tensors(valid, alone=alone), valid[:, :0], valid[..., :0], valid.to_mkldnn()]


def masks() -> list[Any]:
    return [*tensors(SIZE, optional=True, integers=True), SIZE, SIZE.to(torch.bfloat16)]


def counts() -> list[Any]:
    return [*tensors(SIZE, optional=True, integers=True), SIZE.bool(), SIZE.clone().requires_grad_()]


INTEGER = ["2", 1.5, True, [1], 1j, float("nan"), torch.tensor([1, 2]), torch.tensor(1.5), Wrong(), -1, -(2**70)]
NUMBER = ["1", [1.0], float("nan"), float("inf"), 1j, True, Wrong(), torch.tensor([1.0, 2.0])]
CHOICE = ["wrong", 3, b"ortho", ["ortho"], Wrong()]
GRID = [
    5,
    (3,),
    (3, 4, 1),
    "34",
    (0, 12),
    (-3, -4),
    (3.0, 4),
    ("3", "4"),
    (3, 5),
    {3, 4},
    (None, 4),
    (True, 12),
    Wrong(),
]
NEW_GRID = [None, 5, (3,), (3, 4, 1), "34", (0, 12), (-3, -4), (3.0, 4), ("3", "4"), {3, 4}, (None, 4), Wrong()]
FLAG = ["yes", 1.0, None, Wrong()]


def outs(valid: Tensor) -> list[Any]:
    overlapping = torch.ones(30, dtype=valid.dtype).as_strided(valid.shape, (1, 1, 1))
    expanded = torch.ones(1, *valid.shape[1:], dtype=valid.dtype).expand_as(valid)
    negative = torch.ones(valid.shape, dtype=torch.complex64).conj().imag
    values = ["text", 3, [valid], Wrong(), valid[0], valid[:, :-1], valid.double(), valid.to("meta"), valid.to_sparse()]
    return [*values, overlapping, expanded, negative]


SPECTRAL = {"grid": GRID, "prefix_tokens": [*INTEGER, None, 12, 10**30]}
MERGING = {
    "metric": tokens(X),
    "r": [*INTEGER, None],
    "size": counts(),
    "guide": tensors(SIZE, optional=True),
    "guide_weight": [*NUMBER, None],
    "prefix_tokens": [*INTEGER, None, 13],
    "mask": masks(),
    "max_merges": [*INTEGER, 0],
    "threshold": [*NUMBER, 1.5, -2],
}
WRONG: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, list[Any]]]] = {
    "dct": (
        mk.dct,
        {"x": X},
        {
            "x": tokens(X),
            "type": [*INTEGER, None, 0, 5],
            "dim": ["1", 1.5, True, None, 0, 3, Wrong()],
            "norm": CHOICE,
            "out": outs(X),
            **SPECTRAL,
        },
    ),
    "idct": (mk.idct, {"x": X}, {"x": tokens(X), "type": [0, 5], "norm": CHOICE, "out": outs(X), **SPECTRAL}),
    "rfft": (
        mk.rfft,
        {"x": X},
        {"x": tokens(X), "norm": CHOICE, "out": ["text", X, (X,), (X, X), (X[:, :7], X[:, :6])], **SPECTRAL},
    ),
    "irfft": (
        mk.irfft,
        {"real": X, "imag": X, "n": 22},
        {
            "real": [*tensors(X, alone=True), X[..., :0]],
            "imag": [*tensors(X), X.double()],
            "n": [*INTEGER, 0],
            "norm": CHOICE,
        },
    ),
    "spectral_filter": (
        mk.spectral_filter,
        {"x": X, "weight": torch.ones(12, 4), "basis": "dct"},
        {
            "x": tokens(X),
            "weight": tensors(torch.ones(12, 4)),
            "basis": [*CHOICE, None],
            "norm": CHOICE,
            "out": outs(X),
            "grid": [value for value in GRID if value != (3, 5)],
            "prefix_tokens": [*INTEGER, None, 12],
        },
    ),
    "band_energy": (
        mk.band_energy,
        {"x": X, "bands": 3},
        {
            "x": tokens(X),
            "bands": [
                *(value for value in INTEGER if not isinstance(value, Tensor)),
                0,
                None,
                2**40,
                torch.ones(12),
                torch.full((12,), -1),
                torch.ones(3, dtype=torch.int64),
                torch.ones(12, dtype=torch.bool),
            ],
            "basis": [*CHOICE, None],
            **SPECTRAL,
        },
    ),
    "token_energy": (
        mk.token_energy,
        {"x": X, "cutoff": 0.5},
        {"x": tokens(X), "cutoff": [*NUMBER, None, -0.1, 1.1], "basis": [*CHOICE, None], **SPECTRAL},
    ),
    "amplitude_phase": (
        mk.amplitude_phase,
        {"x": X},
        {"x": tokens(X), "eps": [*NUMBER, None, -1e-9], **SPECTRAL},
    ),
    "spectral_resize": (
        mk.spectral_resize,
        {"x": X, "grid": (3, 4), "new_grid": (2, 2)},
        {
            "x": tokens(X),
            "grid": [*GRID, None],
            "new_grid": NEW_GRID,
            "rescale": FLAG,
            "prefix_tokens": [*INTEGER, None],
        },
    ),
    "merge_plan": (mk.merge_plan, {"metric": X, "r": 3}, MERGING),
    "merge_tokens": (mk.merge_tokens, {"x": X, "metric": X, "r": 3}, {**MERGING, "x": tokens(X)}),
    "MergePlan.merge": (PLAN.merge, {"x": X}, {"x": tensors(X), "size": counts()}),
    "MergePlan.unmerge": (PLAN.unmerge, {"y": X[:, 3:]}, {"y": tensors(X[:, 3:])}),
    "MergePlan.then": (PLAN.then, {"plan": mk.merge_plan(X[:, 3:], 1)}, {"plan": [None, 3, X, Wrong(), PLAN]}),
    "weighted_mean": (
        mk.weighted_mean,
        {"x": X},
        {"x": tokens(X), "weight": tensors(SIZE, optional=True), "prefix_tokens": [*INTEGER, None, 12]},
    ),
    "proportional_attention": (
        mk.proportional_attention,
        {"q": HEADS, "k": HEADS, "v": HEADS, "size": None},
        {
            "q": [
                value for value in tensors(HEADS, alone=True) if not isinstance(value, Tensor) or not value.is_nested
            ],
            "k": [*tensors(HEADS)[:-1], HEADS.double()],
            "v": [*tensors(HEADS)[:-1], HEADS.double()],
            "size": [*tensors(SIZE[:, :5], optional=True, integers=True), SIZE[:, :5].clone().requires_grad_()],
            "scale": NUMBER,
            "dropout_p": [*NUMBER, None, -0.1, 1.5],
            "padding": FLAG,
        },
    ),
    "token_logits": (
        mk.token_logits,
        {"image_tokens": X, "text_tokens": X},
        {
            "image_tokens": tokens(X),
            "text_tokens": [*tokens(X), X[..., :3], X.to("meta"), X.double()],
            "image_mask": masks(),
            "text_mask": masks(),
            "image_weight": tensors(SIZE, optional=True),
            "text_weight": tensors(SIZE, optional=True),
            "scale": [*NUMBER, None],
            "bias": NUMBER,
        },
    ),
    "pair_cross_entropy": (
        mk.pair_cross_entropy,
        {"logits": LOGITS},
        {
            "logits": [*tensors(LOGITS, alone=True), LOGITS[:, :3]],
            "labels": [
                "text",
                3,
                [0, 1, 2, 3],
                Wrong(),
                torch.ones(4),
                torch.zeros(3).long(),
                torch.zeros(4, 1).long(),
            ],
            "directions": [*CHOICE, None],
            "label_smoothing": [*NUMBER, None, -0.1, 1.1],
            "reduction": [*CHOICE, None, "none"],
        },
    ),
    "keep_rate_schedule": (
        mk.keep_rate_schedule,
        {"keep_rate": 0.7, "tokens": 196, "depth": 12},
        {
            "keep_rate": [*NUMBER, None, 0.0, 1.5, 0.3],
            "tokens": [*INTEGER, None, 0],
            "depth": [*INTEGER, None, 0],
            "layers": ["text", 3, [1.5], [12], [2, 1], [1, 1], Wrong()],
            "overall": FLAG,
        },
    ),
    "merge_schedule": (
        mk.merge_schedule,
        {"r": 8, "depth": 12},
        {"r": ["8", 1.5, None, -1, True, (1, 2, 3), [1.5], [1] * 13, Wrong()], "depth": [*INTEGER, None, 0]},
    ),
    "merge_layers": (mk.merge_layers, {"depth": 12}, {"depth": [*INTEGER, None, 0]}),
    "token_counts": (
        mk.token_counts,
        {"schedule": [3, 3], "tokens": 12},
        {"schedule": [None, 3, [1.5], [-1], ["1"], Wrong()], "tokens": [*INTEGER, None]},
    ),
}
TABLE = [
    (name, argument, value) for name, (_, _, wrong) in WRONG.items() for argument in wrong for value in wrong[argument]
]


def described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value) if len(repr(value)) < 60 else f"{type(value).__name__} {repr(value)[:50]}..."
    if value.is_nested:
        return "a nested tensor"
    layout = "" if value.layout == torch.strided else f", {value.layout}"
    return f"a tensor {list(value.shape)}, {value.dtype}, on {value.device}{layout}"


def run(name: str, argument: str, value: Any) -> None:
    """Raise AssertionError unless the call with this value for this argument raises an error that names it."""
    function, valid, _ = WRONG[name]
    given = {**valid, argument: value}
    try:
        function(**given)
    except (TypeError, ValueError) as refused:
        # The part of an argument counts: grid[0]; and so does what is wrong with a pair: inflection of r.
        if not re.match(rf"{re.escape(argument)}\b", str(refused)):
            raise AssertionError(f"{argument} = {described(value)}: the error does not name it: {refused}") from refused
    except Exception as failure:
        first = (str(failure).strip().splitlines() or [""])[0][:200]
        raise AssertionError(f"{argument} = {described(value)}: {type(failure).__name__}: {first}") from failure
    else:
        raise AssertionError(f"{argument} = {described(value)} was accepted")
