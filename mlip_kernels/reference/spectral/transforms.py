"""DCT, real FFT and spectral resizing of tokens: one broadcast matmul per axis, tokens never permuted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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

Grid = tuple[int, int]


def dct(x: Tensor, type: int, dim: int, grid: Grid | None, norm: str, prefix_tokens: int) -> Tensor:
    """See `mlip_kernels.dct`."""
    return _cosine_transform(x, dct_matrix, type, dim, grid, norm, prefix_tokens)


def idct(x: Tensor, type: int, dim: int, grid: Grid | None, norm: str, prefix_tokens: int) -> Tensor:
    """See `mlip_kernels.idct`."""
    return _cosine_transform(x, idct_matrix, type, dim, grid, norm, prefix_tokens)


def rfft(x: Tensor, grid: Grid | None, norm: str, prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """See `mlip_kernels.rfft`."""
    real, imaginary = rfft_wide(wide(x[:, prefix_tokens:]), grid, norm)
    return real.to(x.dtype), imaginary.to(x.dtype)


def irfft(real: Tensor, imaginary: Tensor, n: int, grid: Grid | None, norm: str) -> Tensor:
    """See `mlip_kernels.irfft`; ``n`` is the number of tokens, also where ``grid`` is given."""
    return irfft_wide(wide(real), wide(imaginary), n, grid, norm).to(real.dtype)


def spectral_resize(x: Tensor, grid: Grid, new_grid: Grid, rescale: bool, prefix_tokens: int) -> Tensor:
    """See `mlip_kernels.spectral_resize`."""
    (height, width), (new_height, new_width) = grid, new_grid
    tokens = wide(x[:, prefix_tokens:])
    along_w = _matrix(tokens, resize_matrix, width, new_width, rescale)
    along_h = _matrix(tokens, resize_matrix, height, new_height, rescale)
    batch, _, channels = tokens.shape
    tokens = product(along_w, tokens.reshape(batch * height, width, channels))
    tokens = product(along_h, tokens.reshape(batch, height, new_width * channels))
    return behind_prefix(x, tokens.reshape(batch, new_height * new_width, channels), prefix_tokens)


def wide(x: Tensor) -> Tensor:
    """``x`` in the precision that the transforms compute in."""
    return x.to(compute_dtype(x))


def behind_prefix(x: Tensor, tokens: Tensor, prefix_tokens: int) -> Tensor:
    """``tokens`` narrowed to the dtype of ``x``, behind the prefix tokens of ``x`` as they are."""
    tokens = tokens.to(x.dtype)
    return torch.cat((x[:, :prefix_tokens], tokens), 1) if prefix_tokens else tokens.contiguous()


def dct_wide(x: Tensor, build: Callable[..., Tensor], type: int, grid: Grid | None, norm: str) -> Tensor:
    """Transform float32 or float64 tokens over the token axis or the grid."""
    batch, tokens, channels = x.shape
    if grid is None:
        return product(_matrix(x, build, tokens, type, norm), x)
    height, width = grid
    y = product(_matrix(x, build, width, type, norm), x.reshape(batch * height, width, channels))
    y = product(_matrix(x, build, height, type, norm), y.reshape(batch, height, width * channels))
    return y.reshape(batch, tokens, channels)


def rfft_wide(x: Tensor, grid: Grid | None, norm: str) -> tuple[Tensor, Tensor]:
    """Real FFT of float32 or float64 tokens: ``[B, N // 2 + 1, D]`` or ``[B, H, W // 2 + 1, D]``, twice."""
    batch, tokens, channels = x.shape
    if grid is None:
        cosine, sine = _matrix(x, rfft_matrix, tokens, norm).chunk(2)
        return product(cosine, x), product(sine, x)
    height, width = grid
    kept = width // 2 + 1
    half = product(_matrix(x, rfft_matrix, width, norm), x.reshape(batch * height, width, channels))
    half = half.reshape(batch, 2 * height, kept * channels)
    to_real, to_imaginary = _matrix(x, fft_matrix, height, norm)
    shape = (batch, height, kept, channels)
    return product(to_real, half).reshape(shape), product(to_imaginary, half).reshape(shape)


def irfft_wide(real: Tensor, imaginary: Tensor, n: int, grid: Grid | None, norm: str) -> Tensor:
    """Inverse of `rfft_wide` to ``[B, n, D]``; what a real signal cannot have is ignored as CPU ``irfft2`` does."""
    batch, channels = real.shape[0], real.shape[-1]
    spectrum = torch.cat((real, imaginary), 1)
    if grid is None:
        return product(_matrix(real, irfft_matrix, n, norm), spectrum)
    height, width = grid
    kept = width // 2 + 1
    half = product(_matrix(real, ifft_matrix, height, norm), spectrum.reshape(batch, 2 * height, kept * channels))
    tokens = product(_matrix(real, irfft_matrix, width, norm), half.reshape(batch * height, 2 * kept, channels))
    return tokens.reshape(batch, n, channels)


def _matrix(x: Tensor, build: Callable[..., Tensor], *parameters: object) -> Tensor:
    return constant(build, *parameters, device=x.device, dtype=x.dtype)


def _cosine_transform(
    x: Tensor, build: Callable[..., Tensor], type: int, dim: int, grid: Grid | None, norm: str, prefix_tokens: int
) -> Tensor:
    tokens = wide(x[:, prefix_tokens:])
    if dim == 1:
        tokens = dct_wide(tokens, build, type, grid, norm)
    else:
        tokens = product(_matrix(tokens, build, x.shape[2], type, norm), tokens.mT).mT
    return behind_prefix(x, tokens, prefix_tokens)
