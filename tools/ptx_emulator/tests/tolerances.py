"""How close a result has to be. Tolerances follow from the dtype and the size of the values; none is tuned by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute difference from ``truth``; NaN and infinities must stand in the same places."""
    assert actual.shape == truth.shape, f"shape {list(actual.shape)} instead of {list(truth.shape)}"
    actual, truth = actual.double(), truth.double()
    finite = truth.isfinite()
    torch.testing.assert_close(actual[~finite], truth[~finite], equal_nan=True, rtol=0, atol=0)
    assert bool(actual[finite].isfinite().all()), "values are not finite where the truth is"
    return float((actual - truth)[finite].abs().max()) if bool(finite.any()) else 0.0


def largest(values: Tensor) -> float:
    """The largest finite magnitude."""
    return float(values.double().abs().nan_to_num(0, 0, 0).max())


def assert_close(actual: Tensor, expected: Tensor, *, roundings: float = 8.0, name: str = "result") -> None:
    """``actual`` equals ``expected`` up to ``roundings`` roundings of the largest expected value.

    The rounding is that of the coarser of the two dtypes, and that of float64 for integers.
    """
    floating = [tensor.dtype for tensor in (actual, expected) if tensor.is_floating_point()]
    coarser = max((torch.finfo(dtype).eps for dtype in floating), default=torch.finfo(torch.float64).eps)
    allowed = roundings * coarser * max(largest(expected), torch.finfo(torch.float32).tiny)
    found = error(actual, expected)
    assert found <= allowed, f"{name}: differs by {found:.3g}, allowed {allowed:.3g}"


def assert_as_accurate(actual: Tensor, baseline: Tensor, truth: Tensor, *, name: str = "result") -> None:
    """``actual`` is at most twice as far from the float64 ``truth`` as PyTorch's ``baseline`` of the same dtype.

    One rounding of the largest true value is always allowed, so that an exact baseline demands no exact result.
    """
    allowed = 2 * error(baseline, truth) + torch.finfo(actual.dtype).eps * largest(truth)
    found = error(actual, truth)
    assert found <= allowed, f"{name}: error {found:.3g} exceeds {allowed:.3g}, twice PyTorch's own"


def assert_identical(actual: Tensor, expected: Tensor, *, name: str = "result") -> None:
    """Bitwise equality but for the sign of zero, NaN equal to NaN."""
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)} instead of {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} instead of {expected.dtype}"
    assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN in different places"
    values = [tensor.nan_to_num(0, math.inf, -math.inf) for tensor in (actual, expected)]
    assert torch.equal(*values), f"{name}: not bitwise equal"
