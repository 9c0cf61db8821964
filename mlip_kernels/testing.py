"""What the tests of this package measure with, importable by users for their own operators.

The rule of accuracy: an operator may be at most twice as wrong as PyTorch in the same dtype, both measured against
a float64 truth (the rule of FlashAttention and of cut-cross-entropy). It scales itself, so no tolerance is tuned by
hand. Where there is no same-dtype PyTorch to compare with, `assert_close` allows a stated number of roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mlip_kernels._loading import cpu_capability

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Every dtype that the reference and the CPU kernels take."""

TOKEN_SHAPES = (
    (1, 1, 1),
    (2, 2, 3),
    (3, 7, 17),
    (2, 49, 64),
    (1, 50, 65),
    (2, 197, 48),
    (0, 5, 8),
)
"""Awkward ``(B, N, D)``: single elements, odd and prime sizes, a tail after every vector width, an empty batch."""


def epsilon(dtype: torch.dtype) -> float:
    """The relative rounding error of one operation in ``dtype``: half the distance between 1 and the next number."""
    return torch.finfo(dtype).eps / 2


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute difference from a float64 ``truth``; NaN and infinities must stand in the same places."""
    if actual.shape != truth.shape:
        raise AssertionError(f"shape {list(actual.shape)} instead of {list(truth.shape)}")
    if not truth.numel():
        return 0.0
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    finite = truth.isfinite()
    torch.testing.assert_close(actual[~finite], truth[~finite], equal_nan=True, rtol=0, atol=0)
    if not bool(actual[finite].isfinite().all()):
        raise AssertionError(f"{int((~actual[finite].isfinite()).sum())} values are not finite where the truth is")
    return float((actual - truth)[finite].abs().max()) if bool(finite.any()) else 0.0


FEW = 64
"""Results of at most so many elements get the floor of `assert_as_accurate`."""


def assert_as_accurate(
    actual: Tensor,
    baseline: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    scale: float | None = None,
    name: str = "",
) -> None:
    """``actual`` is at most ``factor`` times as far from ``truth`` as ``baseline``, PyTorch in the same dtype.

    One rounding of the largest true value to the dtype of ``actual`` is always allowed, so that an exact baseline
    does not demand an exact result.

    Results of at most `FEW` = 64 different true values (equal elements err alike) have a floor: 8 roundings of the
    dtype that accumulates (float64 for float64, else float32) at ``scale`` are allowed, too, as in `assert_close`. The
    largest of n errors measures how accurate PyTorch is only if n is large. If both sides have normal errors of equal
    deviation, the largest of n errors on one side exceeds twice the largest on the other in 30 % of draws for n = 1
    (exactly 1 - 2/pi arctan 2), in 12 % for 4, 1.8 % for 16, and 0.08 % for 64: for a single number the rule alone
    measures luck.

    Args:
        actual, baseline, truth: results of one shape; ``truth`` in float64.
        factor: how many times PyTorch's error is allowed.
        scale: the largest magnitude that the computation adds or subtracts, where the result is a small difference of
            large numbers (a loss of nearly 0 is one of logits). Default: the largest finite true value.
        name: what to call the result in the message.

    Raises:
        AssertionError: the error is larger, shapes differ, or NaN and infinities stand in other places.
    """
    largest = float(truth.detach().double().abs().nan_to_num(0, 0, 0).max()) if truth.numel() else 0.0
    allowed = factor * error(baseline, truth) + 2 * epsilon(actual.dtype) * largest
    if truth.numel() <= FEW or truth.detach().to(torch.float32).unique().numel() <= FEW:
        accumulates = torch.promote_types(actual.dtype, torch.float32)
        allowed += 8 * 2 * epsilon(accumulates) * (largest if scale is None else scale)
    found = error(actual, truth)
    if found > allowed:
        raise AssertionError(f"{name or 'result'}: error {found:.3g} exceeds {allowed:.3g} ({factor} x PyTorch's own)")


def assert_close(actual: Tensor, expected: Tensor, *, roundings: float = 8.0, name: str = "") -> None:
    """``actual`` equals ``expected`` up to ``roundings`` roundings of the largest expected value.

    The rounding is that of the coarser of the two dtypes. For a sum of n terms, √n roundings is what to expect.
    """
    coarse = max((t.dtype for t in (actual, expected) if t.is_floating_point()), key=epsilon, default=torch.float64)
    scale = float(expected.detach().double().abs().nan_to_num(0, 0, 0).max()) if expected.numel() else 0.0
    allowed = roundings * 2 * epsilon(coarse) * max(scale, torch.finfo(torch.float32).tiny)
    found = error(actual, expected.double())
    if found > allowed:
        raise AssertionError(f"{name or 'result'}: differs by {found:.3g}, allowed {allowed:.3g} at scale {scale:.3g}")


def assert_identical(actual: Tensor, expected: Tensor, *, name: str = "") -> None:
    """Bitwise equality, NaN equal to NaN."""
    same = actual.shape == expected.shape and actual.dtype == expected.dtype
    if same and actual.is_floating_point():
        if not torch.equal(actual.isnan(), expected.isnan()):
            raise AssertionError(f"{name or 'result'}: NaN in different places")
        actual, expected = (values.masked_fill(values.isnan(), 0) for values in (actual, expected))
    if not same or not torch.equal(actual, expected):
        raise AssertionError(f"{name or 'result'}: not bitwise equal")


def gradients(
    function: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor], seed: int = 0
) -> list[Tensor]:
    """Gradients of ``inputs`` (floating point only) for a fixed random cotangent on every output."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    outputs = [y for y in outputs if y.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    wanted = [t for t in leaves if t.requires_grad]
    return list(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True, materialize_grads=True))


def require_cpu_capability() -> None:
    """Raise RuntimeError if ``MLIP_KERNELS_CPU_CAPABILITY`` asks for an instruction set that this processor lacks.

    The kernels run with a smaller one then, and what was to be tested would not be.
    """
    asked, used = cpu_capability()
    if asked is not None and asked != used:
        raise RuntimeError(
            f"MLIP_KERNELS_CPU_CAPABILITY: expected an instruction set that this processor has, got {asked};"
            f" {used or 'no kernel'} would run"
        )


def permuted(x: Tensor) -> Tensor:
    """The same values in dense memory with reversed strides: what a careless ``data_ptr`` reads wrongly."""
    order = tuple(range(x.dim() - 1, -1, -1))
    return x.detach().permute(order).contiguous().permute(order).requires_grad_(x.requires_grad)


@contextmanager
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN, so that an element nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    filling = settings.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        settings.fill_uninitialized_memory = filling


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with ``count`` intra-op CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
