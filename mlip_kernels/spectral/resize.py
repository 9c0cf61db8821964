"""Resizing of the patch grid in the frequency domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mlip_kernels._arguments import check_flag, check_grid_tokens, check_new_grid, check_out
from mlip_kernels._operator import Operator
from mlip_kernels.spectral import kernels, long_axes, plain
from mlip_kernels.spectral.constants import Grid, matrix, resize_matrix


def spectral_resize(
    x: Tensor,
    grid: Sequence[int],
    new_grid: Sequence[int],
    *,
    rescale: bool = True,
    prefix_tokens: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Resize the patch grid in the frequency domain.

    The orthonormal DCT (type 2) over the grid is cropped or zero-padded to the lowest ``h x w`` frequencies and
    transformed back on the new grid: ``A_h X A_wᵀ`` per channel, with one ``h x H`` and one ``w x W`` matrix.

    Args:
        x: tokens ``[B, N, D]``; float32, bfloat16, float16 or float64. B may be 0.
        grid: ``(H, W)`` with ``H · W = N - prefix_tokens``.
        new_grid: ``(h, w)``; each axis may grow or shrink.
        rescale: multiply by ``sqrt(h·w / (H·W))``, which keeps constants constant; without it the energy is kept
            where nothing is cropped.
        prefix_tokens: leading class or register tokens, which are copied through.
        out: a tensor of the shape of the result and the dtype and device of x that receives the result and is returned,
            as `dct` describes.

    Returns:
        ``[B, prefix_tokens + h · w, D]`` in the dtype of x. Half precision is computed in float32 and rounded once.

    Nothing is saved for backward. The operator is linear: it can be differentiated any number of times.

    Raises:
        TypeError, ValueError: naming the argument.
        RuntimeError: ``out`` is given and autograd would record the call.
    """
    if out is None:
        return _resize(x, grid, new_grid, rescale, prefix_tokens)
    checked = x, _, (height, width), _, prefix_tokens, _ = _check(x, grid, new_grid, rescale, prefix_tokens)
    shape = [x.shape[0], prefix_tokens + height * width, x.shape[2]]
    out = check_out("out", out, shape, "[B, prefix_tokens + h · w, D]", (x,))
    _resize_into((out,), *checked)
    return out


class SpectralResize(Operator):
    """``SpectralResize.apply(x, grid, new_grid, rescale=True, prefix_tokens=0)``: `spectral_resize`.

    Linear, so its gradient is itself with the transposed matrices, from the new grid to the old; nothing is saved.
    """

    schema = (
        "spectral_resize(Tensor x, SymInt[] grid, SymInt[] new_grid, bool rescale, SymInt prefix_tokens,"
        " bool transposed) -> Tensor"
    )
    kernels = False
    out = ("out",)

    @staticmethod
    def check(
        x: Tensor,
        grid: Sequence[int],
        new_grid: Sequence[int],
        rescale: bool = True,
        prefix_tokens: int = 0,
        transposed: bool = False,
    ) -> tuple[Any, ...]:
        old, new = check_new_grid("grid", grid), check_new_grid("new_grid", new_grid)
        x, _, prefix_tokens = check_grid_tokens(x, new if transposed else old, prefix_tokens)
        return x, old, new, check_flag("rescale", rescale), prefix_tokens, transposed

    @staticmethod
    def takes(x: Tensor, grid: Grid, new_grid: Grid, rescale: bool, prefix_tokens: int, transposed: bool) -> bool:
        return transposed or not (long_axes.is_long(*grid) or long_axes.is_long(*new_grid))

    @staticmethod
    def compute(x: Tensor, *arguments: Any) -> Tensor:
        return _separable(kernels.separable, x, *arguments)

    @staticmethod
    def write(x: Tensor, *arguments: Any) -> None:
        *arguments, out = arguments  # type: ignore[assignment]
        _separable(kernels.into(kernels.separable_out, out), x, *arguments)

    @staticmethod
    def fake(x: Tensor, grid: Grid, new_grid: Grid, rescale: bool, prefix_tokens: int, transposed: bool) -> Tensor:
        height, width = grid if transposed else new_grid
        return x.new_empty(x.shape[0], prefix_tokens + height * width, x.shape[2])

    @staticmethod
    def plain(x: Tensor, grid: Grid, new_grid: Grid, rescale: bool, prefix_tokens: int, transposed: bool) -> Tensor:
        if transposed or not (long_axes.is_long(*grid) or long_axes.is_long(*new_grid)):
            return _separable(plain.separable, x, grid, new_grid, rescale, prefix_tokens, transposed)
        tokens = long_axes.resized(long_axes.plane(x, *grid, prefix_tokens), *new_grid, rescale)
        return plain.behind_prefix(x, tokens.flatten(1, 2), prefix_tokens)

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.arguments = inputs[1:]

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Tensor:
        *arguments, transposed = ctx.arguments
        return _resize_run(grad, *arguments, not transposed)


_check, _resize, _resize_into, _resize_run = (
    SpectralResize.check,
    SpectralResize.call,
    SpectralResize.call_into,
    SpectralResize.run,
)


def _separable(
    separable: Callable[..., Any],
    x: Tensor,
    grid: Grid,
    new_grid: Grid,
    rescale: bool,
    prefix_tokens: int,
    transposed: bool,
) -> Any:
    matrix_h, matrix_w = (matrix(x, resize_matrix, *axis, rescale) for axis in zip(grid, new_grid, strict=True))
    if transposed:
        return separable(x, matrix_h.t(), matrix_w.t(), *new_grid, prefix_tokens)
    return separable(x, matrix_h, matrix_w, *grid, prefix_tokens)
