"""Energies of tokens by frequency, and the spectrum as amplitude and phase."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_kernels._tracing import hypot
from mlip_kernels.reference.spectral import long_axes
from mlip_kernels.reference.spectral.constants import compute_dtype, constant
from mlip_kernels.reference.spectral.frequencies import equal_bands, high_pass
from mlip_kernels.reference.spectral.matrices import dct_matrix
from mlip_kernels.reference.spectral.primitives import PLAIN, Primitives, band_members
from mlip_kernels.reference.spectral.transforms import (
    Grid,
    Matrices,
    axes_of,
    cosine_matrices,
    fourier_matrices,
    rfft,
)


def band_energy(
    x: Tensor,
    bands: int | Tensor,
    count: int,
    grid: Grid | None,
    basis: str,
    prefix_tokens: int,
    primitives: Primitives = PLAIN,
) -> Tensor:
    """See `mlip_kernels.band_energy`; ``count`` is the number of bands, also where ``bands`` names them."""
    height, width = axes_of(x, grid, prefix_tokens)
    if isinstance(bands, Tensor):
        named = bands.to(x.device, torch.int32).flatten()
    else:
        named = constant(equal_bands, grid or (width,), basis, count, device=x.device, dtype=torch.int32).flatten()
    if long_axes.is_long(height, width):
        plane = long_axes.plane(x, height, width, prefix_tokens)
        rows = band_members(named, count, height, width, plane, basis == "rfft")
        return long_axes.band_energy(plane, rows, basis, grid is not None).to(x.dtype)
    matrices = _matrices(x, height, width, grid, basis)
    return primitives.band_energy(x, named, count, *matrices, height, width, prefix_tokens, basis == "rfft")


def token_energy(
    x: Tensor,
    cutoff: float,
    grid: Grid | None,
    basis: str,
    prefix_tokens: int,
    primitives: Primitives = PLAIN,
) -> Tensor:
    """See `mlip_kernels.token_energy`."""
    height, width = axes_of(x, grid, prefix_tokens)
    kept = constant(high_pass, grid or (width,), basis, cutoff, device=x.device, dtype=compute_dtype(x))
    if long_axes.is_long(height, width):
        plane = long_axes.plane(x, height, width, prefix_tokens)
        kept = kept.reshape(height, -1, 1)
        if basis == "rfft":  # as the weight of a filter, it has an imaginary part
            kept = torch.stack((kept, torch.zeros_like(kept)), -1)
        high = long_axes.filtered(plane, kept, grid is not None)
        return F.pad(high.square().sum(-1).flatten(1), (prefix_tokens, 0))
    kept = kept.reshape(height, width) if basis == "dct" else kept.reshape(height, width // 2 + 1, 1)
    return primitives.token_energy(x, kept, *_matrices(x, height, width, grid, basis), height, width, prefix_tokens)


def amplitude_phase(
    x: Tensor, grid: Grid | None, eps: float, prefix_tokens: int, primitives: Primitives = PLAIN
) -> tuple[Tensor, Tensor]:
    """See `mlip_kernels.amplitude_phase`."""
    real, imaginary = rfft(x.to(compute_dtype(x)), grid, "ortho", prefix_tokens, primitives)
    with torch.no_grad():
        amplitude, phase = hypot(real, imaginary), torch.atan2(imaginary, real)
        # Below the square root of the smallest normal number the derivative of atan2 squares to zero.
        defined = amplitude >= max(eps, math.sqrt(torch.finfo(real.dtype).tiny))
    # Both branches of a where() receive a gradient: the unused one must be finite as well, hence the point (1, 0).
    real = torch.where(defined, real, 1.0)
    imaginary = torch.where(defined, imaginary, 0.0)
    amplitude = torch.where(defined, hypot(real, imaginary), amplitude)
    phase = torch.where(defined, torch.atan2(imaginary, real), phase)
    return amplitude.to(x.dtype), phase.to(x.dtype)


def _matrices(x: Tensor, height: int, width: int, grid: Grid | None, basis: str) -> Matrices:
    if basis == "dct":
        return cosine_matrices(x, dct_matrix, height, width, 2, grid, "ortho")
    return fourier_matrices(x, height, width, grid, "ortho")
