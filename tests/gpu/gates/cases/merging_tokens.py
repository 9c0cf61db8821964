"""What the kernels promise that merge rows of tokens and copy them back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gates.promises import Formula, Kernel, Operator, Problem
from mlip_kernels.merging.plain import Matching, match

FLOAT, INDEX = 4, 8  # bytes of the float32 of sizes and weights, and of the int64 of maps
BACKENDS = ("triton", "cuda")
OPERATORS_OF = torch.ops.mlip_kernels

PROBLEMS = {
    "aligned": {"B": 2, "N": 197, "C": 768, "r": 16, "masked": 0},
    "odd": {"B": 2, "N": 50, "C": 65, "r": 8, "masked": 1},
    "narrow": {"B": 2, "N": 197, "C": 64, "r": 98, "masked": 0},
}
FULL_SIZE = {"B": 256, "N": 197, "C": 768, "r": 16, "masked": 0}


def plan(p: Problem) -> Matching:
    """Of random tokens; a mask masks nothing, so that what is needed can be counted."""
    mask = torch.ones(p.B, p.N, dtype=torch.bool) if p.masked else None
    return match(p.normal(p.B, p.N, 8), p.r, mask=mask)


def outputs(p: Problem) -> int:
    return p.N - p.r


def merge(p: Problem) -> tuple[Tensor, ...]:
    return OPERATORS_OF.merging_merge(p.normal(p.B, p.N, p.C), p.positive(p.B, p.N), *plan(p))


def combine(p: Problem) -> Tensor:
    assignment, kept, removed, _, dropped = plan(p)
    x, weight = p.normal(p.B, p.N, p.C), p.positive(p.B, p.N)
    return OPERATORS_OF.merging_combine(x, weight, assignment, kept, removed, dropped)


def spread(p: Problem) -> Tensor:
    assignment, kept, removed, _, dropped = plan(p)
    y, weight = p.normal(p.B, outputs(p), p.C), p.positive(p.B, p.N)
    return OPERATORS_OF.merging_spread(y, weight, assignment, kept, removed, dropped)


def row_bytes(p: Problem) -> int:
    """Of the input and of the output, each once."""
    return p.element * p.B * (p.N + outputs(p)) * p.C


def combine_bytes(p: Problem) -> int:
    """The row that each output row starts from, the removed rows and where they go, and the weights."""
    maps = INDEX * (outputs(p) + 2 * p.r) + p.masked * p.r
    return row_bytes(p) + p.B * (maps + FLOAT * p.N)


def merge_bytes(p: Problem) -> int:
    """As for combine, with sizes for weights; and the mask, the weights and the new sizes."""
    return combine_bytes(p) + p.B * (p.masked * outputs(p) + FLOAT * (p.N + outputs(p)))


def spread_bytes(p: Problem) -> int:
    return row_bytes(p) + p.B * p.N * (INDEX + FLOAT + p.masked)


def additions(p: Problem) -> int:
    return p.B * p.r * p.C


def rows_are_vectors(p: Problem) -> bool:
    return p.C % 8 == 0


def operator(name: str, call: Callable[[Problem], Any], bytes_of: Formula, macs: Formula = lambda p: 0) -> Operator:
    """One operator is one launch."""
    kernel = Kernel(
        f"merging_{name}_kernel",
        bytes=bytes_of,
        macs=macs,
        wide_loads=rows_are_vectors,
        wide_stores=rows_are_vectors,
        backends=BACKENDS,
    )
    return Operator(
        f"merging_{name}", call=call, bytes=bytes_of, kernels=(kernel,), problems=PROBLEMS, full_size=FULL_SIZE
    )


OPERATORS = (
    operator("merge", merge, merge_bytes, additions),
    operator("combine", combine, combine_bytes, additions),
    operator("spread", spread, spread_bytes),
)
