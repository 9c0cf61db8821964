"""Spectral filter of tokens: transform, weight per coefficient and channel, transform back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_kernels._arguments import (
    check_choice,
    check_grid_tokens,
    check_norm,
    check_out,
    check_same_device,
    check_shape,
    check_tensor,
)
from mlip_kernels._operator import Operator
from mlip_kernels.spectral import kernels, long_axes, plain
from mlip_kernels.spectral.constants import (
    Grid,
    argument_layout,
    axes_of,
    basis_matrices,
    compute_dtype,
    spectrum_shape,
)


def spectral_filter(
    x: Tensor,
    weight: Tensor,
    *,
    grid: Sequence[int] | None = None,
    basis: str = "rfft",
    norm: str | None = "ortho",
    prefix_tokens: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Transform tokens, multiply each coefficient of each channel by a weight, transform back.

    With the basis ``"rfft"`` this is the global filter layer of GFNet: ``irfft2(weight · rfft2(x))`` over the grid, or
    ``irfft(weight · rfft(x))`` over the token axis. A weight that no real kernel has means what CPU
    ``torch.fft.irfft2`` makes of it, on every device: the DC and (even width) Nyquist columns act as
    ``(W[k] + conj W[-k]) / 2``, where -k mirrors the row, in the result and in the gradient of the weight. With
    ``"dct"`` it is ``idct(weight · dct(x))``, type 2.

    Args:
        x: tokens ``[B, N, D]``; float32, bfloat16, float16 or float64. B may be 0.
        weight: real and imaginary parts ``[H, W // 2 + 1, D, 2]`` with a grid or ``[n // 2 + 1, D, 2]`` on the token
            axis (``n = N - prefix_tokens``) for ``"rfft"``; ``[H, W, D]`` or ``[n, D]`` for ``"dct"``. Any of the
            dtypes of x; on the device of x.
        grid: ``(H, W)`` with ``H · W = n``, or ``None`` for the token axis.
        basis: ``"rfft"`` or ``"dct"``.
        norm: ``"ortho"``, ``"backward"`` (or ``None``) or ``"forward"``, applied both ways; the factors cancel, so it
            has no effect on the result beyond rounding.
        prefix_tokens: leading class or register tokens, which are copied through.
        out: a tensor with the shape, dtype and device of x that receives the result and is returned, as in torch. It
            may have any strides and share memory with x or the weight. On CPUs nothing of its size is allocated where
            it is contiguous, shares no memory with them, and no weight in float64 widens x; in all other cases the
            result is computed and copied.

    Returns:
        ``[B, N, D]`` in the dtype of x, computed in float32 (float64 if x or the weight is) and rounded once. A weight
        of zeros gives zeros; an infinite or NaN token makes its channel NaN.

    Saved for backward: the weight where x needs a gradient, x where the weight does; the spectrum is computed again.
    Long axes and the range of values are described in `mlip_kernels.spectral`.
    The operator is linear in either: it can be differentiated any number of times.

    Raises:
        TypeError, ValueError: naming the argument.
        RuntimeError: ``out`` is given and autograd would record the call.

    Source: Rao et al., "Global Filter Networks for Image Classification", NeurIPS 2021, equations 3 to 5.
    """
    if out is None:
        return _filter(x, weight, grid, basis, norm, prefix_tokens)
    checked = x, weight, *_ = _check(x, weight, grid, basis, norm, prefix_tokens)
    out = check_out("out", out, x.shape, "[B, N, D]", (x, weight))
    _filter_into((out,), *checked)
    return out


class SpectralFilter(Operator):
    """``SpectralFilter.apply(x, weight, grid=None, basis="rfft", norm="ortho", prefix_tokens=0)``: `spectral_filter`.

    Saved for backward: the weight where x needs a gradient, x where the weight does. Linear in either, so the gradient
    of x is a filter with the conjugate weight.
    """

    schema = "spectral_filter(Tensor x, Tensor weight, SymInt[]? grid, str basis, SymInt prefix_tokens) -> Tensor"
    kernels = False
    out = ("out",)

    @staticmethod
    def check(
        x: Tensor,
        weight: Tensor,
        grid: Sequence[int] | None = None,
        basis: str = "rfft",
        norm: str | None = "ortho",
        prefix_tokens: int = 0,
    ) -> tuple[Any, ...]:
        x, grid, prefix_tokens = check_grid_tokens(x, grid, prefix_tokens)
        check_choice("basis", basis, ("rfft", "dct"))
        pair, channels = ([2], ", D, 2") if basis == "rfft" else ([], ", D")
        shape = [*spectrum_shape(grid or (x.shape[1] - prefix_tokens,), basis), x.shape[2], *pair]
        weight = check_filter_weight(weight, x, shape, argument_layout(grid, basis, channels))
        check_norm(norm)  # the transforms that stand for all norms are the orthonormal ones
        return x, weight, grid, basis, prefix_tokens

    @staticmethod
    def takes(x: Tensor, weight: Tensor, grid: Grid | None, basis: str, prefix_tokens: int) -> bool:
        return not long_axes.is_long(*axes_of(x, grid, prefix_tokens))

    @staticmethod
    def compute(x: Tensor, *arguments: Any) -> Tensor:
        return _filtered(kernels.filtered, x, *arguments).to(x.dtype)

    @staticmethod
    def write(x: Tensor, weight: Tensor, *arguments: Any) -> None:
        *arguments, out = arguments  # type: ignore[assignment]
        if weight.dtype == torch.float64 != x.dtype:  # computed in another dtype than that of the result
            out.copy_(_filtered(kernels.filtered, x, weight, *arguments))
        else:
            _filtered(kernels.into(kernels.filtered_out, out), x, weight, *arguments)

    @staticmethod
    def fake(x: Tensor, *arguments: Any) -> Tensor:
        return x.new_empty(x.shape)

    @staticmethod
    def plain(x: Tensor, weight: Tensor, grid: Grid | None, basis: str, prefix_tokens: int) -> Tensor:
        height, width = axes_of(x, grid, prefix_tokens)
        if not long_axes.is_long(height, width):
            return _filtered(plain.filtered, x, weight, grid, basis, prefix_tokens).to(x.dtype)
        dtype = compute_dtype(x, weight)
        tokens = x if compute_dtype(x) == dtype else x.to(dtype)
        plane = long_axes.plane(tokens, height, width, prefix_tokens).to(dtype)
        result = long_axes.filtered(plane, (weight if grid else weight.unsqueeze(0)).to(dtype), grid is not None)
        return plain.behind_prefix(tokens, result.flatten(1, 2), prefix_tokens).to(x.dtype)

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, *ctx.arguments = inputs
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.wide = compute_dtype(x, weight)
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grid, basis, prefix_tokens = ctx.arguments
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _filter_run(grad, _conjugate(weight, basis), grid, basis, prefix_tokens)
        if ctx.needs_input_grad[1]:
            if compute_dtype(x) != ctx.wide:
                grad, x = grad.to(ctx.wide), x.to(ctx.wide)
            grad_weight = _backward_weight(grad, x, grid, basis, prefix_tokens)
        return grad_x, grad_weight


class SpectralFilterBackwardWeight(Operator):
    """The gradient of the weight of `SpectralFilter`, in the dtype of the matrices, summed over the batch.

    Linear in either argument: ``<g, filter(x, V)> = <dW(g, x), V>`` for every V.
    """

    schema = (
        "spectral_filter_backward_weight(Tensor grad, Tensor x, SymInt[]? grid, str basis, SymInt prefix_tokens)"
        " -> Tensor"
    )
    kernels = False

    @staticmethod
    def compute(grad: Tensor, x: Tensor, grid: Grid | None, basis: str, prefix_tokens: int) -> Tensor:
        axes = axes_of(x, grid, prefix_tokens)
        matrices = basis_matrices(x, *axes, grid, basis)
        gradient = kernels.filtered_backward_weight(grad, x, *matrices, *axes, prefix_tokens, basis == "rfft")
        return gradient if grid else gradient.squeeze(0)

    @staticmethod
    def fake(grad: Tensor, x: Tensor, grid: Grid | None, basis: str, prefix_tokens: int) -> Tensor:
        shape = [*spectrum_shape(grid or (x.shape[1] - prefix_tokens,), basis), x.shape[2]]
        return x.new_empty([*shape, 2] if basis == "rfft" else shape, dtype=compute_dtype(x))

    plain = compute

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, x, *ctx.arguments = inputs
        ctx.save_for_backward(grad, x)

    @staticmethod
    def gradients(ctx: Any, grad_weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        grad, x = ctx.saved_tensors
        grid, basis, prefix_tokens = ctx.arguments
        grad_grad = grad_x = None
        if ctx.needs_input_grad[0]:
            grad_grad = _without_prefix(x, grad_weight, grid, basis, prefix_tokens)
        if ctx.needs_input_grad[1]:
            grad_x = _without_prefix(grad, _conjugate(grad_weight, basis), grid, basis, prefix_tokens)
        return grad_grad, grad_x


_check, _filter, _filter_into, _filter_run = (
    SpectralFilter.check,
    SpectralFilter.call,
    SpectralFilter.call_into,
    SpectralFilter.run,
)
_backward_weight = SpectralFilterBackwardWeight.run


def _filtered(
    filtered: Callable[..., Any], x: Tensor, weight: Tensor, grid: Grid | None, basis: str, prefix_tokens: int
) -> Any:
    dtype = compute_dtype(x, weight)
    tokens = x if compute_dtype(x) == dtype else x.to(dtype)
    axes = axes_of(x, grid, prefix_tokens)
    matrices = basis_matrices(tokens, *axes, grid, basis)
    weight = (weight if grid else weight.unsqueeze(0)).to(dtype)
    return filtered(tokens, weight, *matrices, *axes, prefix_tokens)


def _conjugate(weight: Tensor, basis: str) -> Tensor:
    if basis == "dct":
        return weight
    # Made on the device, as a constant from the host would be copied at every step and cannot be in a CUDA graph.
    return weight * torch.arange(1, -2, -2, dtype=weight.dtype, device=weight.device)


def _without_prefix(x: Tensor, weight: Tensor, grid: Grid | None, basis: str, prefix_tokens: int) -> Tensor:
    """Filtered tokens behind a prefix of zeros: the prefix has no part in the gradient of the weight."""
    return F.pad(_filter_run(x[:, prefix_tokens:], weight, grid, basis, 0), (0, 0, prefix_tokens, 0))


def check_filter_weight(weight: object, x: Tensor, shape: list[int], layout: str) -> Tensor:
    """Return the weight of a filter."""
    checked = check_tensor("weight", weight, layout=layout)
    check_shape("weight", checked, shape, layout)
    check_same_device("weight", checked, "x", x)
    return checked
