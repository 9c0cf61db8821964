"""The table of operators: every public operator, samples of its arguments, and what is promised of it.

Each file of `tests/promises` is one promise, tested over this whole table, and `tests/gpu/test_gpu_operators.py` runs
the table on GPU kernels. A new operator gets one row, in the file of its family; one without a row fails a test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from operators.case import Case, Operator, assert_right, attempt, cotangent, random, tensors
from operators.contrastive import CONTRASTIVE
from operators.functions import FUNCTIONS
from operators.merging import MERGING
from operators.spectral import BY_TORCH, SPECTRAL

__all__ = [
    "BY_TORCH",
    "FUNCTIONS",
    "OPERATORS",
    "Case",
    "assert_right",
    "attempt",
    "cases",
    "cotangent",
    "differentiable",
    "leading",
    "parameters",
    "random",
    "splits",
    "tensors",
    "traceable",
]

OPERATORS = [*SPECTRAL, *MERGING, *CONTRASTIVE]


def cases(*dtypes: torch.dtype, where: Callable[[Case], Any] = lambda case: True, functions: bool = False) -> list[Any]:
    """The whole table in some dtypes, float64 by default, as parameters named after operator, sample and dtype.

    With ``functions`` also ``.apply`` of the classes in `mlip_kernels.functions`.
    """
    every = (
        (Case(operator, sample, arguments), dtype)
        for operator in (*OPERATORS, *(FUNCTIONS if functions else ()))
        for dtype in dtypes or (torch.float64,)
        for sample, arguments in operator.samples(dtype).items()
    )
    return [pytest.param(case, id=_named(case, dtype, dtypes)) for case, dtype in every if where(case)]


def _named(case: Case, dtype: torch.dtype, dtypes: Sequence[torch.dtype]) -> str:
    parts = [case.operator.name, case.sample, *([str(dtype).removeprefix("torch.")] if len(dtypes) > 1 else [])]
    return "-".join(part.replace(" ", "_") for part in parts)


def differentiable(case: Case) -> bool:
    return bool(case.names)


def leading(case: Case) -> bool:
    """Whether it is the first sample of its row, the most general: enough for what costs seconds."""
    return case.sample == next(iter(case.operator.samples(torch.float32)))


def traceable(case: Case) -> bool:
    """Whether the shapes of the results follow from those of the arguments: named bands are counted."""
    return case.sample != "named bands"


def parameters(operator: Operator) -> list[str]:
    """The names of the arguments of a row's function."""
    return list(inspect.signature(operator.function).parameters)


def splits(*dtypes: torch.dtype, where: Callable[[Case], Any] = lambda case: True) -> list[Any]:
    """One case for each row and dtype, large enough to be divided among threads."""
    every = ((Case(operator, "split", operator.split(dtype)), dtype) for operator in OPERATORS for dtype in dtypes)
    return [pytest.param(case, id=_named(case, dtype, dtypes)) for case, dtype in every if where(case)]
