"""Real Fourier transforms of tokens. Long axes and the range of values: see `mlip_kernels.spectral`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mlip_kernels._arguments import (
    LARGEST_SIZE,
    check_grid_tokens,
    check_integer,
    check_new_grid,
    check_norm,
    check_out,
    check_same_device,
    check_shape,
    check_tensor,
    may_overlap,
    sequence_of,
)
from mlip_kernels._operator import Operator
from mlip_kernels.spectral import kernels, long_axes, plain
from mlip_kernels.spectral.constants import (
    Grid,
    axes_of,
    compute_dtype,
    fourier_matrices,
    ifft_matrix,
    irfft_matrix,
    matrix,
    spectrum_shape,
)


def rfft(
    x: Tensor,
    *,
    grid: Sequence[int] | None = None,
    norm: str | None = "ortho",
    prefix_tokens: int = 0,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Fourier transform of real tokens as two real tensors: no complex tensor appears.

    Equals ``torch.fft.rfft(x, dim=1)`` without a grid and ``torch.fft.rfft2(x.view(B, H, W, D), dim=(1, 2))`` with one.

    Args:
        x: tokens ``[B, N, D]``; float32, bfloat16, float16 or float64. B may be 0.
        grid: ``(H, W)`` with ``H · W = N - prefix_tokens``, or ``None`` for the token axis.
        norm: ``"ortho"`` (divide by the square root of the number of points), ``"backward"`` (do not scale; ``None``
            means the same) or ``"forward"`` (divide by the number of points).
        prefix_tokens: leading class or register tokens, which are left out of the spectrum.
        out: two tensors ``(real, imag)`` that receive the result and are returned, as `dct` describes.

    Returns:
        ``(real, imag)`` in the dtype of x, each ``[B, n // 2 + 1, D]`` with ``n = N - prefix_tokens``, or
        ``[B, H, W // 2 + 1, D]`` with H in FFT order. The imaginary part of DC and Nyquist is exactly 0 on the token
        axis. Half precision is computed in float32 and rounded once.

    Nothing is saved for backward. The operator is linear: it can be differentiated any number of times.

    Raises:
        TypeError, ValueError: naming the argument.
        RuntimeError: ``out`` is given and autograd would record the call.

    Source: Cooley and Tukey, Mathematics of Computation 19, 1965, for the transform; definition of ``torch.fft``.
    """
    if out is None:
        return _rfft(x, grid, norm, prefix_tokens)
    checked = x, axes, _, prefix_tokens = _check_rfft(x, grid, norm, prefix_tokens)
    shape = [x.shape[0], *spectrum_shape(axes or (x.shape[1] - prefix_tokens,), "rfft"), x.shape[2]]
    parts = check_given_pair(out, shape, "[B, H, W // 2 + 1, D]" if axes else "[B, n // 2 + 1, D]", x)
    _rfft_into(parts, *checked)
    return parts


def irfft(
    real: Tensor,
    imag: Tensor,
    *,
    n: int | None = None,
    grid: Sequence[int] | None = None,
    norm: str | None = "ortho",
    out: Tensor | None = None,
) -> Tensor:
    """Real tokens from half a spectrum: the inverse of `rfft`.

    Equals ``torch.fft.irfft(torch.complex(real, imag), n, dim=1)`` or, on a grid, CPU ``torch.fft.irfft2`` with
    ``s=(H, W), dim=(1, 2)``, on every device: for a spectrum that no real signal has, the inverse over H comes first,
    and the imaginary part of the DC and (W even) Nyquist columns is then ignored.

    Args:
        real: ``[B, n // 2 + 1, D]``, or ``[B, H, W // 2 + 1, D]`` with a grid; float32, bfloat16, float16 or float64.
        imag: the same shape, dtype and device.
        n: the number of tokens; ``None`` means ``2 (K - 1)`` for K coefficients, as in ``torch.fft``, which is wrong
            for an odd number of tokens. Not given together with a grid.
        grid: ``(H, W)``, or ``None`` for the token axis.
        norm: the norm that `rfft` was called with.
        out: a tensor of the shape of the result and the dtype and device of ``real`` that receives the result and is
            returned, as `dct` describes.

    Returns:
        ``[B, n, D]`` or ``[B, H · W, D]`` in the dtype of ``real``. Half precision is computed in float32 and rounded
        once.

    Nothing is saved for backward. The operator is linear: it can be differentiated any number of times.

    Raises:
        TypeError, ValueError: naming the argument. A spectrum is never cropped or padded to fit n.
        RuntimeError: ``out`` is given and autograd would record the call.
    """
    if out is None:
        return _irfft(real, imag, n, grid, norm)
    checked = real, imag, n, grid, norm = _check_irfft(real, imag, n, grid, norm)
    layout = "[B, H · W, D]" if grid else "[B, n, D]"
    out = check_out("out", out, [real.shape[0], n, real.shape[-1]], layout, (real, imag))
    _irfft_into((out,), *checked)
    return out


class RFFT(Operator):
    """``RFFT.apply(x, grid=None, norm="ortho", prefix_tokens=0)``: `rfft`. Linear; nothing is saved."""

    schema = "rfft(Tensor x, SymInt[]? grid, str norm, SymInt prefix_tokens) -> (Tensor real, Tensor imag)"
    kernels = False
    out = ("out_real", "out_imag")

    @staticmethod
    def check(
        x: Tensor, grid: Sequence[int] | None = None, norm: str | None = "ortho", prefix_tokens: int = 0
    ) -> tuple[Any, ...]:
        x, grid, prefix_tokens = check_grid_tokens(x, grid, prefix_tokens)
        return x, grid, check_norm(norm), prefix_tokens

    @staticmethod
    def takes(x: Tensor, grid: Grid | None, norm: str, prefix_tokens: int) -> bool:
        return not long_axes.is_long(*axes_of(x, grid, prefix_tokens))

    @staticmethod
    def compute(x: Tensor, grid: Grid | None, norm: str, prefix_tokens: int) -> tuple[Tensor, Tensor]:
        return _without_rows(grid, *_analysis(kernels.analysis, x, grid, norm, prefix_tokens))

    @staticmethod
    def write(x: Tensor, grid: Grid | None, norm: str, prefix_tokens: int, out_real: Tensor, out_imag: Tensor) -> None:
        parts = (out_real, out_imag) if grid else (out_real.unsqueeze(1), out_imag.unsqueeze(1))
        _analysis(kernels.into(kernels.analysis_out, *parts), x, grid, norm, prefix_tokens)

    @staticmethod
    def fake(x: Tensor, grid: Grid | None, norm: str, prefix_tokens: int) -> tuple[Tensor, Tensor]:
        shape = (x.shape[0], *spectrum_shape(grid or (x.shape[1] - prefix_tokens,), "rfft"), x.shape[2])
        return x.new_empty(shape), x.new_empty(shape)

    @staticmethod
    def plain(x: Tensor, grid: Grid | None, norm: str, prefix_tokens: int) -> tuple[Tensor, Tensor]:
        height, width = axes_of(x, grid, prefix_tokens)
        if not long_axes.is_long(height, width):
            return _without_rows(grid, *_analysis(plain.analysis, x, grid, norm, prefix_tokens))
        parts = long_axes.fourier(long_axes.plane(x, height, width, prefix_tokens), norm, grid is not None)
        return _without_rows(grid, *(part.to(x.dtype) for part in parts))

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, *ctx.arguments = inputs
        ctx.tokens = x.shape[1]

    @staticmethod
    def gradients(ctx: Any, grad_real: Tensor, grad_imag: Tensor) -> Tensor:
        return _rfft_adjoint(grad_real, grad_imag, ctx.tokens, *ctx.arguments)


class RFFTAdjoint(Operator):
    """The gradient of `RFFT`: its adjoint, whose own gradient is `RFFT` again."""

    schema = (
        "rfft_adjoint(Tensor real, Tensor imag, SymInt tokens, SymInt[]? grid, str norm, SymInt prefix_tokens)"
        " -> Tensor"
    )
    kernels = False

    @staticmethod
    def compute(real: Tensor, imag: Tensor, tokens: int, grid: Grid | None, norm: str, prefix_tokens: int) -> Tensor:
        height, width = grid or (1, tokens - prefix_tokens)
        matrix_h, matrix_w = fourier_matrices(real, height, width, grid, norm)
        real, imag = _with_rows(grid, real, imag)
        return kernels.synthesis(real, imag, plain.adjoint(matrix_h), matrix_w.t(), prefix_tokens)

    @staticmethod
    def fake(real: Tensor, imag: Tensor, tokens: int, *arguments: Any) -> Tensor:
        return real.new_empty(real.shape[0], tokens, real.shape[-1])

    plain = compute

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.arguments = inputs[3:]

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _rfft_run(grad, *ctx.arguments)


class InverseRFFT(Operator):
    """``InverseRFFT.apply(real, imag, n=None, grid=None, norm="ortho")``: `irfft`. Linear; nothing is saved."""

    schema = "irfft(Tensor real, Tensor imag, SymInt n, SymInt[]? grid, str norm) -> Tensor"
    kernels = False
    out = ("out",)

    @staticmethod
    def check(
        real: Tensor,
        imag: Tensor,
        n: int | None = None,
        grid: Sequence[int] | None = None,
        norm: str | None = "ortho",
    ) -> tuple[Any, ...]:
        real, imag, tokens, checked_grid = check_spectrum(real, imag, n, grid)
        return real, imag, tokens, checked_grid, check_norm(norm)

    @staticmethod
    def takes(real: Tensor, imag: Tensor, n: int, grid: Grid | None, norm: str) -> bool:
        return not long_axes.is_long(*(grid or (1, n)))

    @staticmethod
    def compute(real: Tensor, imag: Tensor, n: int, grid: Grid | None, norm: str) -> Tensor:
        return _synthesis(kernels.synthesis, real, imag, n, grid, norm)

    @staticmethod
    def write(real: Tensor, imag: Tensor, n: int, grid: Grid | None, norm: str, out: Tensor) -> None:
        _synthesis(kernels.into(kernels.synthesis_out, out), real, imag, n, grid, norm)

    @staticmethod
    def fake(real: Tensor, imag: Tensor, n: int, grid: Grid | None, norm: str) -> Tensor:
        return real.new_empty(real.shape[0], n, real.shape[-1])

    @staticmethod
    def plain(real: Tensor, imag: Tensor, n: int, grid: Grid | None, norm: str) -> Tensor:
        height, width = grid or (1, n)
        if not long_axes.is_long(height, width):
            return _synthesis(plain.synthesis, real, imag, n, grid, norm)
        wide, shape = compute_dtype(real), (real.shape[0], height, width // 2 + 1, real.shape[-1])
        real_part, imaginary_part = (part.to(wide).reshape(shape) for part in (real, imag))
        tokens = long_axes.inverse_fourier(real_part, imaginary_part, width, norm, grid is not None)
        return tokens.flatten(1, 2).to(real.dtype).contiguous()

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.arguments = inputs[2:]

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _irfft_adjoint(grad, *ctx.arguments)


class InverseRFFTAdjoint(Operator):
    """The gradient of `InverseRFFT`: its adjoint, whose own gradient is `InverseRFFT` again."""

    schema = "irfft_adjoint(Tensor x, SymInt n, SymInt[]? grid, str norm) -> (Tensor real, Tensor imag)"
    kernels = False

    @staticmethod
    def compute(x: Tensor, n: int, grid: Grid | None, norm: str) -> tuple[Tensor, Tensor]:
        height, width = grid or (1, n)
        matrix_h, matrix_w = _inverse_matrices(x, height, width, grid, norm)
        return _without_rows(grid, *kernels.analysis(x, plain.adjoint(matrix_h), matrix_w.t(), height, width, 0))

    @staticmethod
    def fake(x: Tensor, n: int, grid: Grid | None, norm: str) -> tuple[Tensor, Tensor]:
        shape = (x.shape[0], *spectrum_shape(grid or (n,), "rfft"), x.shape[2])
        return x.new_empty(shape), x.new_empty(shape)

    plain = compute

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.arguments = inputs[1:]

    @staticmethod
    def gradients(ctx: Any, grad_real: Tensor, grad_imag: Tensor) -> Tensor:
        return _irfft_run(grad_real, grad_imag, *ctx.arguments)


_check_rfft, _rfft, _rfft_into, _rfft_run = RFFT.check, RFFT.call, RFFT.call_into, RFFT.run
_check_irfft, _irfft, _irfft_into, _irfft_run = (
    InverseRFFT.check,
    InverseRFFT.call,
    InverseRFFT.call_into,
    InverseRFFT.run,
)
_rfft_adjoint, _irfft_adjoint = RFFTAdjoint.run, InverseRFFTAdjoint.run


def _analysis(analysis: Callable[..., Any], x: Tensor, grid: Grid | None, norm: str, prefix_tokens: int) -> Any:
    height, width = axes_of(x, grid, prefix_tokens)
    return analysis(x, *fourier_matrices(x, height, width, grid, norm), height, width, prefix_tokens)


def _synthesis(synthesis: Callable[..., Any], real: Tensor, imag: Tensor, n: int, grid: Grid | None, norm: str) -> Any:
    matrices = _inverse_matrices(real, *(grid or (1, n)), grid, norm)
    return synthesis(*_with_rows(grid, real, imag), *matrices, 0)


def _inverse_matrices(
    like: Tensor, height: int, width: int, grid: Grid | None, norm: str
) -> tuple[Tensor | None, Tensor]:
    return matrix(like, ifft_matrix, height, norm) if grid else None, matrix(like, irfft_matrix, width, norm)


def _with_rows(grid: Grid | None, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    """The token axis is a grid of one row."""
    return (real, imag) if grid else (real.unsqueeze(1), imag.unsqueeze(1))


def _without_rows(grid: Grid | None, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    return (real, imag) if grid else (real.flatten(1, 2), imag.flatten(1, 2))


def check_spectrum(real: object, imag: object, n: object, grid: object) -> tuple[Tensor, Tensor, int, Grid | None]:
    """Return half a spectrum, the number of its tokens, and their grid."""
    if grid is not None:
        height, width = check_new_grid("grid", grid)
        if n is not None:
            raise ValueError(f"n: expected None where a grid is given, got {n!r}")
        layout, tokens = "[B, H, W // 2 + 1, D]", height * width
        first = check_tensor("real", real, layout=layout)
        shape = [first.shape[0], height, width // 2 + 1, first.shape[-1]]
    else:
        layout = "[B, n // 2 + 1, D]"
        first = check_tensor("real", real, layout=layout)
        tokens = 2 * (first.shape[1] - 1) if n is None else check_integer("n", n, minimum=1, maximum=LARGEST_SIZE)
        if tokens < 1:
            raise ValueError(
                f"n: expected the number of tokens, as {first.shape[1]} coefficients do not tell it, got None"
            )
        shape = [first.shape[0], tokens // 2 + 1, first.shape[-1]]
    check_shape("real", first, shape, layout)
    if first.shape[-1] < 1:
        raise ValueError(f"real: expected {layout} with D >= 1, got shape {list(first.shape)}")
    second = check_tensor("imag", imag, layout=layout, dtypes=(first.dtype,))
    check_shape("imag", second, shape, layout)
    check_same_device("imag", second, "real", first)
    return first, second, tokens, None if grid is None else (height, width)


def check_given_pair(out: object, shape: Sequence[int], layout: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tensors that receive real and imaginary part."""
    pair = None if isinstance(out, Tensor) else sequence_of(out)
    if pair is None or len(pair) != 2:
        count = f" of {len(pair)}" if pair is not None else ""
        raise TypeError(f"out: expected (real, imag), got a {type(out).__name__}{count}")
    real, imag = (check_out(f"out[{i}]", part, shape, layout, inputs) for i, part in enumerate(pair))
    if _share_memory(real, imag):
        raise ValueError("out: expected two tensors with memory of their own, got two that share some")
    return real, imag


def _share_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape may share an element; the two parts of a complex tensor do not."""
    if first is second:
        return True
    if torch.compiler.is_compiling() or not torch._C._is_alias_of(first, second):  # type: ignore[attr-defined]
        return False
    apart = abs(int(first.storage_offset()) - int(second.storage_offset()))
    if first.stride() == second.stride():
        return apart == 0 or may_overlap(first, (2, apart))
    earlier = first if first.storage_offset() < second.storage_offset() else second
    return apart <= sum(stride * (length - 1) for stride, length in zip(earlier.stride(), earlier.shape, strict=True))
