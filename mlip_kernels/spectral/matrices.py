"""The transforms as small dense float64 matrices, one per axis, and which of them a call takes.

Angles are reduced, as integers, to an eighth of a turn on either side of 0 before the cosine is taken: every entry is
right to about one rounding, and the sine rows of DC and Nyquist are exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mlip_kernels._tracing import number
from mlip_kernels.spectral.constants import compute_dtype, constant, fetched_by_graphs

Grid = tuple[int, int]
Matrices = tuple[Tensor | None, Tensor]
"""``along_h``, None on the token axis, and ``along_w``."""

_INVERSE_TYPE = {1: 1, 2: 3, 3: 2, 4: 4}
_INVERSE_NORM = {"backward": "forward", "forward": "backward", "ortho": "ortho"}


def waves(rows: Tensor, columns: Tensor, period: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``rows · columns`` (integers) times a full turn divided by ``period``."""
    quarters = 4 * (torch.outer(rows, columns) % period)
    nearest = (2 * quarters + period) // (2 * period)
    angle = (quarters - nearest * period).double() / period * (math.pi / 2)
    cosine, sine, odd = angle.cos(), angle.sin(), nearest % 2 == 1
    cosine, sine = torch.where(odd, -sine, cosine), torch.where(odd, cosine, sine)
    half_turn = nearest % 4 >= 2
    return torch.where(half_turn, -cosine, cosine), torch.where(half_turn, -sine, sine)


def ones_except(mask: Tensor, value: float) -> Tensor:
    """1 in float64, and ``value`` where the mask is True."""
    return torch.ones(mask.shape, dtype=torch.float64, device=mask.device).masked_fill(mask, value)


def scale_of(norm: str, period: int, *, inverse: bool = False) -> float:
    """The factor of a norm, for a transform of ``period`` points (a cosine transform mirrors its points)."""
    if norm == "ortho":
        return 1 / torch.sym_sqrt(period)
    return 1 / period if (norm == "forward") != inverse else 1.0


def inverse_of(type: int, norm: str) -> tuple[int, str]:
    """Type and norm of the inverse DCT: 2 and 3 are each other's inverse, 1 and 4 their own, up to the norm."""
    return _INVERSE_TYPE[type], _INVERSE_NORM[norm]


@fetched_by_graphs
def dct_matrix(n: int, type: int, norm: str, *, device: torch.device) -> Tensor:
    """``[n, n]`` matrix of ``scipy.fft.dct`` of this type and norm (``ortho`` means ``orthogonalize=True``)."""
    k = torch.arange(n, device=device)
    both_ends = (k == 0) | (k == n - 1)
    if type == 1:
        period = 2 * (n - 1)
        matrix = 2 * waves(k, k, period)[0]
        inputs, outputs = both_ends, both_ends
    elif type == 2:
        period = 2 * n
        matrix = 2 * waves(k, 2 * k + 1, 2 * period)[0]
        inputs, outputs = k < 0, k == 0
    elif type == 3:
        period = 2 * n
        matrix = 2 * waves(2 * k + 1, k, 2 * period)[0]
        inputs, outputs = k == 0, k < 0
    else:
        period = 2 * n
        matrix = 2 * waves(2 * k + 1, 2 * k + 1, 4 * period)[0]
        inputs, outputs = k < 0, k < 0
    if norm == "ortho":
        root = math.sqrt(0.5)
        matrix = ones_except(outputs, root)[:, None] * matrix * ones_except(inputs, root)
    else:
        matrix = matrix * ones_except(inputs, 0.5)
    return matrix * scale_of(norm, period)


@fetched_by_graphs
def idct_matrix(n: int, type: int, norm: str, *, device: torch.device) -> Tensor:
    """The inverse of `dct_matrix`."""
    return dct_matrix(n, *inverse_of(type, norm), device=device)


@fetched_by_graphs
def rfft_matrix(n: int, norm: str, *, device: torch.device) -> Tensor:
    """``[2 (n // 2 + 1), n]``: real tokens to the real parts, then the imaginary parts, of half the spectrum."""
    cosine, sine = waves(torch.arange(n // 2 + 1, device=device), torch.arange(n, device=device), n)
    return torch.cat((cosine, -sine)) * scale_of(norm, n)


@fetched_by_graphs
def irfft_matrix(n: int, norm: str, *, device: torch.device) -> Tensor:
    """``[n, 2 (n // 2 + 1)]``: half a spectrum, real then imaginary parts, to real tokens.

    The other half is the mirror image, so its coefficients count twice. DC and Nyquist are their own image: they
    count once, and an imaginary part there has no effect, as their sine is 0.
    """
    k = torch.arange(n // 2 + 1, device=device)
    cosine, sine = waves(torch.arange(n, device=device), k, n)
    own_image = (k == 0) | (2 * k == n)
    return torch.cat((torch.where(own_image, cosine, 2 * cosine), -2 * sine), 1) * scale_of(norm, n, inverse=True)


@fetched_by_graphs
def fft_matrix(n: int, norm: str, *, device: torch.device) -> Tensor:
    """``[2, n, n]``: real and imaginary part of the matrix of the complex FFT."""
    k = torch.arange(n, device=device)
    cosine, sine = waves(k, k, n)
    return torch.stack((cosine, -sine)) * scale_of(norm, n)


@fetched_by_graphs
def ifft_matrix(n: int, norm: str, *, device: torch.device) -> Tensor:
    """``[2, n, n]``: real and imaginary part of the matrix of the inverse of the complex FFT."""
    k = torch.arange(n, device=device)
    cosine, sine = waves(k, k, n)
    return torch.stack((cosine, sine)) * scale_of(norm, n, inverse=True)


@fetched_by_graphs
def resize_matrix(n: int, new_n: int, rescale: bool, *, device: torch.device) -> Tensor:
    """``[new_n, n]``: orthonormal DCT, its first ``new_n`` coefficients (or zeros behind), inverse on ``new_n``."""
    kept = torch.sym_min(n, new_n)
    analysis = dct_matrix(n, 2, "ortho", device=device)[:kept]
    synthesis = dct_matrix(new_n, 3, "ortho", device=device)[:, :kept]
    return synthesis @ analysis * (torch.sym_sqrt(new_n / n) if rescale else 1.0)


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
    return matrix(x, build, height, type, norm) if grid else None, matrix(x, build, width, type, norm)


def fourier_matrices(x: Tensor, height: int, width: int, grid: Grid | None, norm: str) -> Matrices:
    """The real FFT along rows and the complex FFT along columns."""
    return matrix(x, fft_matrix, height, norm) if grid else None, matrix(x, rfft_matrix, width, norm)


def basis_matrices(x: Tensor, height: int, width: int, grid: Grid | None, basis: str) -> Matrices:
    """The orthonormal transforms: DCT of type 2, or FFT."""
    if basis == "dct":
        return cosine_matrices(x, dct_matrix, height, width, 2, grid, "ortho")
    return fourier_matrices(x, height, width, grid, "ortho")


def matrix(x: Tensor, build: Callable[..., Tensor], *parameters: object) -> Tensor:
    """``build(*parameters)`` on the device of x, in the dtype that x is computed in."""
    return constant(build, *parameters, device=x.device, dtype=compute_dtype(x))
