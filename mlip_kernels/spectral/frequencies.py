"""What frequency a coefficient stands for, which band it belongs to, and how often it counts.

Axes are ``(n,)`` for the token axis and ``(height, width)`` for the grid. With the basis ``rfft`` the last axis has
``n // 2 + 1`` coefficients and the others are in FFT order. The normalised frequency of an axis is ``k / n`` for the
DCT and ``2 |k| / n`` for the FFT; on a grid ``ρ = sqrt((f_h² + f_w²) / 2)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlip_kernels.spectral.constants import fetched_by_graphs


def spectrum_shape(axes: Sequence[int], basis: str) -> tuple[int, ...]:
    """The coefficients along each axis."""
    return (*axes[:-1], axes[-1] // 2 + 1) if basis == "rfft" else tuple(axes)


def _numerators(axes: Sequence[int], basis: str, device: torch.device) -> list[Tensor]:
    """Per axis ``n · f`` as integers, shaped to broadcast over the spectrum."""
    result = []
    for axis, (n, count) in enumerate(zip(axes, spectrum_shape(axes, basis), strict=True)):
        k = torch.arange(count, device=device)
        if basis == "rfft":
            k = 2 * torch.minimum(k, n - k)
        result.append(k.reshape([-1 if other == axis else 1 for other in range(len(axes))]))
    return result


def _squared_radius(axes: Sequence[int], basis: str, device: torch.device) -> tuple[Tensor, int, int]:
    """Integers ``p``, ``q`` and ``n`` with ``ρ² = p / (q n²)``: comparisons need not round."""
    numerators = _numerators(axes, basis, device)
    if len(axes) == 1:
        return numerators[0] ** 2, 1, axes[0]
    (rows, columns), (height, width) = numerators, axes
    return (rows * width) ** 2 + (columns * height) ** 2, 2, height * width


def frequency_radius(axes: Sequence[int], basis: str, *, device: torch.device) -> Tensor:
    """``ρ`` of every coefficient in float64, correctly rounded wherever it is a rational number."""
    p, q, n = _squared_radius(axes, basis, device)
    return (p.double() / q).sqrt() / n


@fetched_by_graphs
def high_pass(axes: Sequence[int], basis: str, cutoff: float, *, device: torch.device) -> Tensor:
    """1 for every coefficient with ``ρ >= cutoff``, 0 for the others."""
    return (frequency_radius(axes, basis, device=device) >= cutoff).double()


@fetched_by_graphs
def equal_bands(axes: Sequence[int], basis: str, bands: int, *, device: torch.device) -> Tensor:
    """The band of every coefficient: ``floor(ρ · bands)``, and ``bands - 1`` for ``ρ = 1``; exact, in integers."""
    p, q, n = _squared_radius(axes, basis, device)
    lower_edges = torch.arange(1, bands, device=device) ** 2 * (q * n**2)
    return torch.searchsorted(lower_edges, p * bands**2, right=True)
