"""DCT, real FFT and spectral resizing of tokens: which matrices they are."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mlip_kernels._tracing import number
from mlip_kernels.reference.spectral import long_axes
from mlip_kernels.reference.spectral.constants import compute_dtype, constant, product
from mlip_kernels.reference.spectral.matrices import (
    dct_matrix,
    fft_matrix,
    idct_matrix,
    ifft_matrix,
    irfft_matrix,
    resize_matrix,
    rfft_matrix,
)
from mlip_kernels.reference.spectral.primitives import PLAIN, Primitives, behind_prefix

Grid = tuple[int, int]
Matrices = tuple[Tensor | None, Tensor]
"""``along_h`` and ``along_w``."""


def dct(
    x: Tensor, type: int, dim: int, grid: Grid | None, norm: str, prefix_tokens: int, primitives: Primitives = PLAIN
) -> Tensor:
    """See `mlip_kernels.dct`."""
    return _cosine_transform(x, dct_matrix, type, dim, grid, norm, prefix_tokens, primitives)


def idct(
    x: Tensor, type: int, dim: int, grid: Grid | None, norm: str, prefix_tokens: int, primitives: Primitives = PLAIN
) -> Tensor:
    """See `mlip_kernels.idct`."""
    return _cosine_transform(x, idct_matrix, type, dim, grid, norm, prefix_tokens, primitives)


def rfft(
    x: Tensor, grid: Grid | None, norm: str, prefix_tokens: int, primitives: Primitives = PLAIN
) -> tuple[Tensor, Tensor]:
    """See `mlip_kernels.rfft`."""
    height, width = axes_of(x, grid, prefix_tokens)
    if long_axes.is_long(height, width):
        parts = long_axes.fourier(long_axes.plane(x, height, width, prefix_tokens), norm, grid is not None)
        real, imaginary = (part.to(x.dtype) for part in parts)
    else:
        matrices = fourier_matrices(x, height, width, grid, norm)
        real, imaginary = primitives.analysis(x, *matrices, height, width, prefix_tokens)
    return (real, imaginary) if grid else (real.flatten(1, 2), imaginary.flatten(1, 2))


def irfft(
    real: Tensor, imaginary: Tensor, n: int, grid: Grid | None, norm: str, primitives: Primitives = PLAIN
) -> Tensor:
    """See `mlip_kernels.irfft`; ``n`` is the number of tokens, also where ``grid`` is given."""
    height, width = grid or (1, n)
    if long_axes.is_long(height, width):
        dtype, shape = compute_dtype(real), (real.shape[0], height, width // 2 + 1, real.shape[-1])
        wide_real, wide_imaginary = real.to(dtype).reshape(shape), imaginary.to(dtype).reshape(shape)
        tokens = long_axes.inverse_fourier(wide_real, wide_imaginary, width, norm, grid is not None)
        return tokens.flatten(1, 2).to(real.dtype).contiguous()
    along_h = _matrix(real, ifft_matrix, height, norm) if grid else None
    along_w = _matrix(real, irfft_matrix, width, norm)
    if not grid:
        real, imaginary = real.unsqueeze(1), imaginary.unsqueeze(1)
    return primitives.synthesis(real, imaginary, along_h, along_w, 0)


def spectral_resize(
    x: Tensor, grid: Grid, new_grid: Grid, rescale: bool, prefix_tokens: int, primitives: Primitives = PLAIN
) -> Tensor:
    """See `mlip_kernels.spectral_resize`."""
    if long_axes.is_long(*grid) or long_axes.is_long(*new_grid):
        tokens = long_axes.resized(long_axes.plane(x, *grid, prefix_tokens), *new_grid, rescale)
        return behind_prefix(x, tokens.flatten(1, 2), prefix_tokens)
    along_h, along_w = (_matrix(x, resize_matrix, *axis, rescale) for axis in zip(grid, new_grid, strict=True))
    return primitives.separable(x, along_h, along_w, *grid, prefix_tokens)


def axes_of(x: Tensor, grid: Grid | None, prefix_tokens: int) -> Grid:
    """Height and width: the token axis is a grid of one row."""
    if grid:
        return grid
    tokens = x.shape[1]
    return 1, (tokens if type(tokens) is int else number(tokens)) - prefix_tokens


def cosine_matrices(
    x: Tensor, build: Callable[..., Tensor], height: int, width: int, type: int, grid: Grid | None, norm: str
) -> Matrices:
    """The DCT along both axes of the grid, or along the token axis."""
    return _matrix(x, build, height, type, norm) if grid else None, _matrix(x, build, width, type, norm)


def fourier_matrices(x: Tensor, height: int, width: int, grid: Grid | None, norm: str) -> Matrices:
    """The real FFT along rows and the complex FFT along columns."""
    return _matrix(x, fft_matrix, height, norm) if grid else None, _matrix(x, rfft_matrix, width, norm)


def _matrix(x: Tensor, build: Callable[..., Tensor], *parameters: object) -> Tensor:
    return constant(build, *parameters, device=x.device, dtype=compute_dtype(x))


def _cosine_transform(
    x: Tensor,
    build: Callable[..., Tensor],
    type: int,
    dim: int,
    grid: Grid | None,
    norm: str,
    prefix_tokens: int,
    primitives: Primitives,
) -> Tensor:
    if dim == 2:  # over the channels: a matrix product, which a library does best
        if long_axes.is_long(1, number(x.shape[2])):
            along = long_axes.cosine if build is dct_matrix else long_axes.inverse_cosine
            tokens = along(x[:, prefix_tokens:].to(compute_dtype(x)), 2, type, norm)
            return behind_prefix(x, tokens, prefix_tokens)
        matrix = _matrix(x, build, number(x.shape[2]), type, norm)
        tokens = product(matrix, x[:, prefix_tokens:].to(matrix.dtype).mT).mT
        return behind_prefix(x, tokens, prefix_tokens)
    height, width = axes_of(x, grid, prefix_tokens)
    if long_axes.is_long(height, width):
        along = long_axes.cosine if build is dct_matrix else long_axes.inverse_cosine
        tokens = along(long_axes.plane(x, height, width, prefix_tokens), 2, type, norm)
        tokens = along(tokens, 1, type, norm) if grid else tokens
        return behind_prefix(x, tokens.flatten(1, 2), prefix_tokens)
    matrices = cosine_matrices(x, build, height, width, type, grid, norm)
    return primitives.separable(x, *matrices, height, width, prefix_tokens)
