"""What one unit of work may cost: warp instructions (PTX as executed on the emulated sm_90) that one more of it adds.

A budget has two limits: for the better of the two backends, and for the other one. Where no number of instructions can
be named, a limit is a time by the model: what the usual way, a product by cuBLAS, would take by the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gates.cases import OPERATORS, contrastive, merging_tokens
from gates.model import H200, Times, times
from gates.promises import Formula, Operator, Problem
from mlip_kernels.merging.plain import merged_sizes

ARCH = 90
DTYPE = "bf16"
Rows = Mapping[Any, Mapping[str, Any]]


@dataclass(frozen=True)
class Limits:
    """Warp instructions."""

    better: int
    other: int


@dataclass(frozen=True)
class Seconds:
    """A time by the model, for the better backend."""

    seconds: float
    of: str  # what takes so long


@dataclass(frozen=True, eq=False)
class Budget:
    """One unit of work, and what it may cost."""

    unit: str
    operator: str  # the entry in ``gates/cases`` that runs it
    smaller: Mapping[str, int]
    larger: Mapping[str, int]
    units: Formula
    """How many of them a problem has."""
    limit: Limits | Seconds
    amount: int
    """How many of them the model is shown for."""
    bytes: float
    """Of one of that many: compulsory, to or from DRAM."""
    call: Callable[[Problem], Any] | None = None
    """What to run, if not what the entry runs."""

    @property
    def entry(self) -> Operator:
        return next(operator for operator in OPERATORS if operator.name == self.operator)

    def problems(self) -> tuple[Problem, Problem]:
        return Problem(self.smaller, DTYPE, ARCH), Problem(self.larger, DTYPE, ARCH)

    def run(self, problem: Problem) -> None:
        (self.call or self.entry.call)(problem)

    def times(self, slope: Mapping[str, Any]) -> Times:
        """By the model, of ``amount`` units on an H200."""
        return times(slope, self.amount, self.amount * self.bytes, H200)

    def kept(self, slopes: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether the backends, by name, keep to the limit."""
        if isinstance(self.limit, Seconds):
            return min(self.times(slope).total for slope in slopes.values()) <= self.limit.seconds
        limits = (self.limit.better, self.limit.other)
        counts = sorted(slope["instructions"] for slope in slopes.values())
        return all(count <= limit for count, limit in zip(counts, limits, strict=False))

    def allowed(self, backend: str, slopes: Mapping[str, Mapping[str, Any]]) -> float:
        """The instructions that a backend may take: what the budget says, or what it takes now if that is more."""
        now = slopes[backend]["instructions"]
        if isinstance(self.limit, Seconds):
            return now
        better = now == min(slope["instructions"] for slope in slopes.values())
        return max(now, self.limit.better if better else self.limit.other)


def backward_of_images(p: Problem) -> None:
    """Of random tokens, whose winners collide as they do."""
    images, texts, shares = contrastive.images(p), contrastive.texts(p), contrastive.shares(p)
    reference = torch.ops.mlip_kernels.contrastive_token_maxima.default._op_dk
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    winners = reference(key, images, texts, None, None, *shares, True, False)[2:4]
    grads = p.positive(p.B, p.C), p.positive(p.C, p.B)
    torch.ops.mlip_kernels.contrastive_token_maxima_backward(*grads, texts, None, None, *shares, *winners)


def forward_of_short_texts(p: Problem) -> None:
    """Of ``M`` tokens of a text, ``real`` are."""
    mask = (torch.arange(p.M) < p.real).expand(p.C, p.M).contiguous()
    shares = torch.full((p.B, p.N), 1 / p.N), mask / p.real
    torch.ops.mlip_kernels.contrastive_token_maxima(
        contrastive.images(p), contrastive.texts(p), None, mask, *shares, True, False
    )


def merge(p: Problem) -> None:
    """Of tokens that were not merged before."""
    ones = torch.ones(p.B, p.N)
    torch.ops.mlip_kernels.merging_merge(p.normal(p.B, p.N, p.C), ones, *merging_tokens.plan(p))


def spread(p: Problem) -> None:
    """Back to them: what was not merged has the weight 1."""
    plan = merging_tokens.plan(p)
    _, weight = merged_sizes(torch.ones(p.B, p.N), plan, torch.float32)
    y = p.normal(p.B, merging_tokens.outputs(p), p.C)
    torch.ops.mlip_kernels.merging_spread(y, weight, plan.assignment, plan.kept, plan.removed, None)


PAIRS = {"B": 2, "N": 49, "M": 77, "masked": 0}
MANY_PAIRS = 1024 * 1024


def pairs(unit: str, sizes: Mapping[str, int], limit: Limits, operator: str = "", **how: Any) -> Budget:
    """Pairs of two images with 16 and with 48 texts; the model is shown for 1,024 of each."""
    tokens = 2 * (sizes["N"] + sizes.get("real", sizes["M"])) * sizes["D"] / 1024
    return Budget(
        unit=unit,
        operator=f"contrastive_token_maxima{operator}",
        smaller={**sizes, "C": 16},
        larger={**sizes, "C": 48},
        units=lambda p: p.B * p.C,
        limit=limit,
        amount=MANY_PAIRS,
        bytes=tokens + sizes["N"] + sizes["M"] + 8,
        **how,
    )


ROWS = {"N": 197, "C": 768, "r": 13, "masked": 0}
ROW_BYTES = 2 * 768 * (197 + 184) + 12 * 197  # of an image
GRID = {"H": 14, "W": 14, "D": 128, "prefix": 1}
TOKENS = {"H": 1, "W": 197, "D": 128, "prefix": 0, "fourier": 0}
IMAGES = 256
TWO_PART_PRODUCT = 80e-6


def channels(unit: str, operator: str, of_unit: int, sizes: Mapping[str, int], limit: Limits | Seconds) -> Budget:
    """Channels of one image and of three."""
    return Budget(
        unit=unit,
        operator=operator,
        smaller={**sizes, "B": 1},
        larger={**sizes, "B": 3},
        units=lambda p: p.B * p.D // of_unit,
        limit=limit,
        amount=IMAGES * 768 // of_unit,
        bytes=2 * 2 * of_unit * 197,
    )


def rows(unit: str, operator: str, limit: Limits, call: Callable[[Problem], Any]) -> Budget:
    """Rows of two images and of four."""
    return Budget(
        call=call,
        unit=unit,
        operator=operator,
        smaller={**ROWS, "B": 2},
        larger={**ROWS, "B": 4},
        units=lambda p: p.B,
        limit=limit,
        amount=IMAGES,
        bytes=ROW_BYTES,
    )


BUDGETS: tuple[Budget, ...] = (
    pairs("token logits, pair of 49 × 77, D = 256", {**PAIRS, "D": 256}, Limits(3_500, 7_000)),
    pairs("token logits, pair of 49 × 77, D = 512", {**PAIRS, "D": 512}, Limits(5_500, 11_000)),
    pairs(
        "token logits, pair of 67 × 16 real of 77, D = 256",
        {**PAIRS, "N": 67, "D": 256, "real": 16},
        Limits(2_000, 4_000),
        call=forward_of_short_texts,
    ),
    pairs(
        "their backward to the image, pair of 49 × 77, D = 256",
        {**PAIRS, "D": 256},
        Limits(2_800, 6_000),
        operator="_backward",
        call=backward_of_images,
    ),
    rows("merge, image of 197 × 768, r = 13", "merging_merge", Limits(60_000, 90_000), merge),
    rows("its backward, image of 197 × 768, r = 13", "merging_spread", Limits(21_000, 40_000), spread),
    channels("DCT 14 × 14, 32 channels", "spectral_separable", 32, {**GRID, "fourier": 0}, Limits(3_300, 6_500)),
    channels(
        "rfft filter 14 × 14, 32 channels", "spectral_filtered", 32, {**GRID, "fourier": 1}, Limits(9_000, 18_000)
    ),
    channels(
        "DCT of 197 tokens, 64 channels",
        "spectral_separable, long token axis",
        64,
        TOKENS,
        Seconds(TWO_PART_PRODUCT, "cuBLAS with the matrix in two parts"),
    ),
)


def of(operators: Iterable[Operator]) -> tuple[Budget, ...]:
    """The budgets of these operators."""
    names = {operator.name for operator in operators}
    return tuple(budget for budget in BUDGETS if budget.operator in names)


def by_backend(slopes: Rows, budget: Budget) -> dict[str, Mapping[str, Any]]:
    """What was measured of a budget: backend -> its row."""
    return {key.backend: row for key, row in slopes.items() if key.unit == budget.unit}
