"""Discrete cosine transforms of tokens. Long axes and the range of values: see `mlip_kernels.spectral`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mlip_kernels._arguments import check_grid_tokens, check_integer, check_norm, check_out
from mlip_kernels._operator import Operator
from mlip_kernels._tracing import number
from mlip_kernels.spectral import kernels, long_axes, plain
from mlip_kernels.spectral.constants import (
    Grid,
    axes_of,
    compute_dtype,
    cosine_matrices,
    dct_matrix,
    idct_matrix,
    matrix,
)


def dct(
    x: Tensor,
    *,
    type: int = 2,
    dim: int = 1,
    grid: Sequence[int] | None = None,
    norm: str | None = "ortho",
    prefix_tokens: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Discrete cosine transform of tokens, with the types and norms of ``scipy.fft``.

    Equals ``scipy.fft.dct(x, type, axis=dim, norm=norm)`` without a grid and ``scipy.fft.dctn`` over the axes H and W
    with one.

    Args:
        x: tokens ``[B, N, D]``; float32, bfloat16, float16 or float64. B may be 0.
        type: 1, 2, 3 or 4.
        dim: 1 transforms over the tokens, 2 over the channels (-2 and -1 count from the end).
        grid: ``(H, W)`` with ``H · W = N - prefix_tokens`` transforms over both axes of the patch grid; ``None`` over
            the one axis ``dim``.
        norm: ``"ortho"`` (orthonormal: scipy's ``orthogonalize=True``), ``"backward"`` (the transform is not scaled)
            or ``"forward"`` (it is divided by 2n, for type 1 by 2(n - 1), per axis); ``None`` means ``"backward"``.
        prefix_tokens: leading class or register tokens, which are copied through.
        out: a tensor with the shape, dtype and device of x that receives the result and is returned, as in torch. It
            may have any strides and share memory with x. On CPUs nothing of its size is allocated where it is
            contiguous, shares no memory with x, and ``dim`` is 1; in all other cases the result is computed and copied.

    Returns:
        ``[B, N, D]`` in the dtype of x; on a grid, token ``prefix_tokens + k_h · W + k_w`` is coefficient
        ``(k_h, k_w)``. Half precision is computed in float32 and rounded once, so a float16 coefficient beyond 65504
        is infinite. An infinite or NaN token makes the whole spectrum of its channel NaN or infinite. How
        large tokens may be, and what happens on axes of more than 1,024 points: see `mlip_kernels.spectral`.

    Nothing is saved for backward. The operator is linear: it can be differentiated any number of times.

    Raises:
        TypeError, ValueError: naming the argument. Type 1 needs two points along each axis.
        RuntimeError: ``out`` is given and autograd would record the call.

    Source: Ahmed, Natarajan and Rao, "Discrete Cosine Transform", IEEE Transactions on Computers, 1974.
    """
    return _transform(_dct, _dct_into, dct_matrix, x, type, dim, grid, norm, prefix_tokens, out)


def idct(
    x: Tensor,
    *,
    type: int = 2,
    dim: int = 1,
    grid: Sequence[int] | None = None,
    norm: str | None = "ortho",
    prefix_tokens: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Inverse of `dct` with the same arguments: ``idct(dct(x, ...), ...)`` is x, for each type and norm.

    Equals ``scipy.fft.idct`` or, with a grid, ``scipy.fft.idctn``; with ``norm="backward"`` it divides by 2n (type 1:
    by 2(n - 1)) per axis, with ``"forward"`` it does not scale. Arguments, result, what is saved for backward and
    errors are as in `dct`.
    """
    return _transform(_idct, _idct_into, idct_matrix, x, type, dim, grid, norm, prefix_tokens, out)


class DCT(Operator):
    """``DCT.apply(x, type=2, grid=None, norm="ortho", prefix_tokens=0)``: `dct` over the tokens, ``dim=1``.

    Linear, so its gradient is itself with the transposed matrices (``transposed=True``); nothing is saved.
    """

    schema = "dct(Tensor x, int type, SymInt[]? grid, str norm, SymInt prefix_tokens, bool transposed) -> Tensor"
    kernels = False
    out = ("out",)

    @staticmethod
    def check(
        x: Tensor,
        type: int = 2,
        grid: Sequence[int] | None = None,
        norm: str | None = "ortho",
        prefix_tokens: int = 0,
        transposed: bool = False,
    ) -> tuple[Any, ...]:
        x, grid, prefix_tokens = check_grid_tokens(x, grid, prefix_tokens)
        type = check_dct_type(type, grid or (x.shape[1] - prefix_tokens,))
        return x, type, grid, check_norm(norm), prefix_tokens, transposed

    @staticmethod
    def takes(x: Tensor, type: int, grid: Grid | None, norm: str, prefix_tokens: int, transposed: bool) -> bool:
        return transposed or not long_axes.is_long(*axes_of(x, grid, prefix_tokens))

    @staticmethod
    def compute(x: Tensor, *arguments: Any) -> Tensor:
        return _separable(kernels.separable, dct_matrix, x, *arguments)

    @staticmethod
    def write(x: Tensor, *arguments: Any) -> None:
        *arguments, out = arguments  # type: ignore[assignment]
        _separable(kernels.into(kernels.separable_out, out), dct_matrix, x, *arguments)

    @staticmethod
    def fake(x: Tensor, *arguments: Any) -> Tensor:
        return x.new_empty(x.shape)

    @staticmethod
    def plain(x: Tensor, *arguments: Any) -> Tensor:
        return _plain(dct_matrix, long_axes.cosine, x, *arguments)

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.arguments = inputs[1:]

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Tensor:
        *arguments, transposed = ctx.arguments
        return _dct_run(grad, *arguments, not transposed)


class InverseDCT(Operator):
    """``InverseDCT.apply(x, type=2, grid=None, norm="ortho", prefix_tokens=0)``: `idct`, as `DCT` is `dct`."""

    schema = "idct(Tensor x, int type, SymInt[]? grid, str norm, SymInt prefix_tokens, bool transposed) -> Tensor"
    kernels = False
    out = ("out",)
    check, takes, fake, save = DCT.check, DCT.takes, DCT.fake, DCT.save

    @staticmethod
    def compute(x: Tensor, *arguments: Any) -> Tensor:
        return _separable(kernels.separable, idct_matrix, x, *arguments)

    @staticmethod
    def write(x: Tensor, *arguments: Any) -> None:
        *arguments, out = arguments  # type: ignore[assignment]
        _separable(kernels.into(kernels.separable_out, out), idct_matrix, x, *arguments)

    @staticmethod
    def plain(x: Tensor, *arguments: Any) -> Tensor:
        return _plain(idct_matrix, long_axes.inverse_cosine, x, *arguments)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Tensor:
        *arguments, transposed = ctx.arguments
        return _idct_run(grad, *arguments, not transposed)


_check_dct = DCT.check
_dct, _dct_into, _dct_run = DCT.call, DCT.call_into, DCT.run
_idct, _idct_into, _idct_run = InverseDCT.call, InverseDCT.call_into, InverseDCT.run


def _separable(
    separable: Callable[..., Any],
    build: Callable[..., Tensor],
    x: Tensor,
    type: int,
    grid: Grid | None,
    norm: str,
    prefix_tokens: int,
    transposed: bool,
) -> Any:
    """The transform whose matrix along an axis is ``build(n, type, norm)``, by the kernel or by plain PyTorch."""
    height, width = axes_of(x, grid, prefix_tokens)
    matrix_h, matrix_w = cosine_matrices(x, build, height, width, type, grid, norm)
    if transposed:
        matrix_h, matrix_w = None if matrix_h is None else matrix_h.t(), matrix_w.t()
    return separable(x, matrix_h, matrix_w, height, width, prefix_tokens)


def _plain(
    build: Callable[..., Tensor],
    along: Callable[..., Tensor],
    x: Tensor,
    type: int,
    grid: Grid | None,
    norm: str,
    prefix_tokens: int,
    transposed: bool,
) -> Tensor:
    height, width = axes_of(x, grid, prefix_tokens)
    if transposed or not long_axes.is_long(height, width):
        return _separable(plain.separable, build, x, type, grid, norm, prefix_tokens, transposed)
    tokens = along(long_axes.plane(x, height, width, prefix_tokens), 2, type, norm)
    tokens = along(tokens, 1, type, norm) if grid else tokens
    return plain.behind_prefix(x, tokens.flatten(1, 2), prefix_tokens)


def _transform(
    run: Callable[..., Tensor],
    run_into: Callable[..., None],
    build: Callable[..., Tensor],
    x: Tensor,
    type: int,
    dim: int,
    grid: Sequence[int] | None,
    norm: str | None,
    prefix_tokens: int,
    out: Tensor | None,
) -> Tensor:
    dim = check_axis(dim, grid)
    if dim == 1 and out is None:
        return run(x, type, grid, norm, prefix_tokens)
    if dim == 1:
        checked = _check_dct(x, type, grid, norm, prefix_tokens)
        out = check_out("out", out, x.shape, "[B, N, D]", (x,))
        run_into((out,), *checked)
        return out
    x, _, prefix_tokens = check_grid_tokens(x, None, prefix_tokens)
    type = check_dct_type(type, (x.shape[2],))
    norm = check_norm(norm)
    if out is not None:
        out = check_out("out", out, x.shape, "[B, N, D]", (x,))
    result = _over_channels(build, x, type, norm, prefix_tokens)
    return result if out is None else out.copy_(result)


def _over_channels(build: Callable[..., Tensor], x: Tensor, type: int, norm: str, prefix_tokens: int) -> Tensor:
    """A matrix product, which a library does best."""
    channels = number(x.shape[2])
    if long_axes.is_long(1, channels):
        along = long_axes.cosine if build is dct_matrix else long_axes.inverse_cosine
        tokens = along(x[:, prefix_tokens:].to(compute_dtype(x)), 2, type, norm)
    else:
        matrix_channels = matrix(x, build, channels, type, norm)
        tokens = plain.product(matrix_channels, x[:, prefix_tokens:].to(matrix_channels.dtype).mT).mT
    return plain.behind_prefix(x, tokens, prefix_tokens)


def check_axis(dim: object, grid: object) -> int:
    """Return the axis of a transform: 1, the tokens, or 2, the channels. A grid lies on the token axis."""
    axis = check_integer("dim", dim, minimum=-2, maximum=2) % 3
    if axis == 0:
        raise ValueError(f"dim: expected 1 (tokens) or 2 (channels), got {dim}")
    if grid is not None and axis != 1:
        raise ValueError(f"dim: expected 1 where a grid is given, got {dim}")
    return axis


def check_dct_type(type: object, lengths: Sequence[int]) -> int:
    """Return the type of a DCT; type 1 is defined from two points on."""
    number = check_integer("type", type, minimum=1, maximum=4)
    if number == 1 and min(lengths) < 2:
        raise ValueError(f"type: 1 needs at least 2 points along each axis, got {' x '.join(map(str, lengths))}")
    return number
