"""Spectral filter: transform, weight per coefficient and channel, transform back."""

from __future__ import annotations

from torch import Tensor

from mlip_kernels.reference.spectral import long_axes
from mlip_kernels.reference.spectral.constants import compute_dtype
from mlip_kernels.reference.spectral.matrices import dct_matrix
from mlip_kernels.reference.spectral.primitives import PLAIN, Primitives, behind_prefix
from mlip_kernels.reference.spectral.transforms import Grid, axes_of, cosine_matrices, fourier_matrices


def spectral_filter(
    x: Tensor, weight: Tensor, grid: Grid | None, basis: str, prefix_tokens: int, primitives: Primitives = PLAIN
) -> Tensor:
    """See `mlip_kernels.spectral_filter`; norms cancel, so the orthonormal transforms serve all of them."""
    dtype = compute_dtype(x, weight)
    tokens = x if compute_dtype(x) == dtype else x.to(dtype)
    height, width = axes_of(x, grid, prefix_tokens)
    if long_axes.is_long(height, width):
        weight = (weight if grid else weight.unsqueeze(0)).to(dtype)
        plane = long_axes.plane(tokens, height, width, prefix_tokens).to(dtype)
        result = long_axes.filtered(plane, weight, grid is not None)
        return behind_prefix(tokens, result.flatten(1, 2), prefix_tokens).to(x.dtype)
    if basis == "dct":
        matrices = cosine_matrices(tokens, dct_matrix, height, width, 2, grid, "ortho")
    else:
        matrices = fourier_matrices(tokens, height, width, grid, "ortho")
    weight = (weight if grid else weight.unsqueeze(0)).to(dtype)
    return primitives.filtered(tokens, weight, *matrices, height, width, prefix_tokens).to(x.dtype)
