"""Energies of tokens by frequency, and the spectrum as amplitude and phase."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_kernels.reference.spectral.constants import constant, product
from mlip_kernels.reference.spectral.frequencies import equal_bands, high_pass, multiplicity
from mlip_kernels.reference.spectral.matrices import dct_matrix, idct_matrix
from mlip_kernels.reference.spectral.transforms import Grid, dct_wide, irfft_wide, rfft_wide, wide


def band_energy(
    x: Tensor, bands: int | Tensor, count: int, grid: Grid | None, basis: str, prefix_tokens: int
) -> Tensor:
    """See `mlip_kernels.band_energy`; ``count`` is the number of bands, also where ``bands`` names them."""
    tokens = wide(x[:, prefix_tokens:])
    axes = grid or (tokens.shape[1],)
    if isinstance(bands, Tensor):
        weights = constant(multiplicity, axes, basis, device=x.device, dtype=tokens.dtype)
        members = _members(bands.to(x.device).long(), weights, count)
    else:
        members = constant(_equal_members, axes, basis, count, device=x.device, dtype=tokens.dtype)
    if basis == "dct":
        power = dct_wide(tokens, dct_matrix, 2, grid, "ortho").square()
    else:
        real, imaginary = rfft_wide(tokens, grid, "ortho")
        power = (real.square() + imaginary.square()).flatten(1, -2)
    return product(members, power).to(x.dtype)


def token_energy(x: Tensor, cutoff: float, grid: Grid | None, basis: str, prefix_tokens: int) -> Tensor:
    """See `mlip_kernels.token_energy`."""
    tokens = wide(x[:, prefix_tokens:])
    n = tokens.shape[1]
    kept = constant(high_pass, grid or (n,), basis, cutoff, device=x.device, dtype=tokens.dtype).unsqueeze(-1)
    if basis == "dct":
        high = dct_wide(tokens, dct_matrix, 2, grid, "ortho") * kept.reshape(n, 1)
        high = dct_wide(high, idct_matrix, 2, grid, "ortho")
    else:
        real, imaginary = rfft_wide(tokens, grid, "ortho")
        high = irfft_wide(real * kept, imaginary * kept, n, grid, "ortho")
    return F.pad(high.square().sum(-1), (prefix_tokens, 0))


def amplitude_phase(x: Tensor, grid: Grid | None, eps: float, prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """See `mlip_kernels.amplitude_phase`."""
    real, imaginary = rfft_wide(wide(x[:, prefix_tokens:]), grid, "ortho")
    with torch.no_grad():
        amplitude, phase = torch.hypot(real, imaginary), torch.atan2(imaginary, real)
        # Below the square root of the smallest normal number the derivative of atan2 squares to zero.
        defined = amplitude >= max(eps, math.sqrt(torch.finfo(real.dtype).tiny))
    # Both branches of a where() receive a gradient: the unused one must be finite as well, hence the point (1, 0).
    real = torch.where(defined, real, 1.0)
    imaginary = torch.where(defined, imaginary, 0.0)
    amplitude = torch.where(defined, torch.hypot(real, imaginary), amplitude)
    phase = torch.where(defined, torch.atan2(imaginary, real), phase)
    return amplitude.to(x.dtype), phase.to(x.dtype)


def _members(bands: Tensor, weights: Tensor, count: int) -> Tensor:
    """``[count, coefficients]``: the multiplicity of each coefficient in its band's row, 0 in the others."""
    named = bands.reshape(1, -1) == torch.arange(count, device=bands.device)[:, None]
    return torch.where(named, weights.reshape(1, -1), 0.0)


def _equal_members(axes: tuple[int, ...], basis: str, count: int, *, device: torch.device) -> Tensor:
    bands = equal_bands(axes, basis, count, device=device)
    return _members(bands, multiplicity(axes, basis, device=device), count)
