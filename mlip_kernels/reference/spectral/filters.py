"""Spectral filter: transform, weight per coefficient and channel, transform back."""

from __future__ import annotations

from torch import Tensor

from mlip_kernels.reference.spectral.constants import compute_dtype
from mlip_kernels.reference.spectral.matrices import dct_matrix, idct_matrix
from mlip_kernels.reference.spectral.transforms import Grid, behind_prefix, dct_wide, irfft_wide, rfft_wide


def spectral_filter(x: Tensor, weight: Tensor, grid: Grid | None, basis: str, norm: str, prefix_tokens: int) -> Tensor:
    """See `mlip_kernels.spectral_filter`."""
    dtype = compute_dtype(x, weight)
    tokens, weight = x[:, prefix_tokens:].to(dtype), weight.to(dtype)
    if basis == "dct":
        spectrum = dct_wide(tokens, dct_matrix, 2, grid, norm) * weight.reshape(tokens.shape[1:])
        return behind_prefix(x, dct_wide(spectrum, idct_matrix, 2, grid, norm), prefix_tokens)
    real, imaginary = rfft_wide(tokens, grid, norm)
    weight_real, weight_imaginary = weight.unbind(-1)
    filtered = irfft_wide(
        real * weight_real - imaginary * weight_imaginary,
        real * weight_imaginary + imaginary * weight_real,
        tokens.shape[1],
        grid,
        norm,
    )
    return behind_prefix(x, filtered, prefix_tokens)
