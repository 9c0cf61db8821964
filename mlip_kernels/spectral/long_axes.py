"""The transforms along axes of more than 1,024 points: ``torch.fft`` instead of matrices, O(n log n) instead of O(n²).

A matrix beats an FFT at every size a vision transformer has; for 16,384 points it would take a gigabyte and minutes to
build. All of this is ordinary differentiable PyTorch, the same on every device; half precision is float32 inside.
A grid is transformed here as soon as one of its axes is long.

Every cosine transform is one FFT of about twice the length, with factors before and after it::

    1   the real part of the FFT of x, mirrored at both ends
    2   Re(a · rfft(x)),             x padded to 2 n points by zeros
    3   irfft(b · x)                 of 2 n points
    4   Re(a · fft(b · x)),          padded to 2 n points

Source: Ahmed, Natarajan and Rao, "Discrete Cosine Transform", IEEE Transactions on Computers, 1974.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_kernels._tracing import number
from mlip_kernels.spectral.constants import (
    compute_dtype,
    constant,
    fetched_by_graphs,
    inverse_of,
    ones_except,
    scale_of,
    waves,
)
from mlip_kernels.spectral.plain import product

LONGEST_MATRIX = 1024
"""The longest axis that is transformed by a matrix."""


def is_long(height: int, width: int) -> bool:
    """Whether one of the axes is too long for a matrix.

    ``torch.compile`` makes another graph for long axes. A graph of ``torch.export`` whose number of tokens is free has
    to serve all of them, and multiplies by matrices unless the least allowed number is a long one.
    """
    if torch.compiler.is_exporting():
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes long to import

        return any(statically_known_true(n > LONGEST_MATRIX) for n in (height, width))
    return width > LONGEST_MATRIX or height > LONGEST_MATRIX


@fetched_by_graphs("SymInt n, SymInt type, str norm")
def cosine_factors(n: int, type: int, norm: str, *, device: torch.device) -> Tensor:
    """``[4, n]``: real and imaginary part of the factors before, then of those after the FFT, scaled by the norm."""
    k = torch.arange(n, device=device)
    one = torch.ones(1, dtype=torch.int64, device=device)
    period = 2 * (n - 1) if type == 1 else 2 * n
    quarter = torch.cat(waves(k, one, 2 * period), 1).t()  # a quarter of a turn from end to end
    odd_steps = torch.cat(waves(2 * k + 1, one, 4 * period), 1).t()
    nothing = torch.stack((torch.ones_like(k), torch.zeros_like(k))).double()
    conjugate = torch.tensor(((1.0,), (-1.0,)), dtype=torch.float64, device=device)
    before = quarter if type == 3 else quarter * conjugate if type == 4 else nothing
    after = 2 * conjugate * (quarter if type == 2 else odd_steps) if type in (2, 4) else nothing
    if norm == "ortho":  # what is summed at an end of a mirrored axis, or comes out there, counts the root of a half
        ends = (k == 0) | (k == n - 1) if type == 1 else k == 0
        before = ones_except(ends, math.sqrt(2)) * before if type in (1, 3) else before
        after = ones_except(ends, math.sqrt(0.5)) * after if type in (1, 2) else after
    scale = scale_of(norm, period)
    return torch.cat((before * scale, after) if type == 3 else (before, after * scale))


def cosine(x: Tensor, axis: int, type: int, norm: str) -> Tensor:
    """``scipy.fft.dct(x, type, axis=axis, norm=norm)`` of a float32 or float64 tensor."""
    n = number(x.shape[axis])
    shape = [n if other == axis else 1 for other in range(x.dim())]
    factors = constant(cosine_factors, n, type, norm, device=x.device, dtype=x.dtype)
    before_real, before_imaginary, after_real, after_imaginary = factors.view(4, *shape).unbind()
    if type == 1:
        x = x * before_real
        mirrored = torch.cat((x, x.narrow(axis, 1, n - 2).flip(axis)), axis)
        return _along(torch.fft.rfft, mirrored, dim=axis).real * after_real
    if type == 2:
        spectrum = _along(torch.fft.rfft, x, n=2 * n, dim=axis)
    else:
        turned = torch.complex(x * before_real, x * before_imaginary)
        if type == 3:
            return _along(torch.fft.irfft, turned, n=2 * n, dim=axis, norm="forward").narrow(axis, 0, n)
        spectrum = _along(torch.fft.fft, turned, n=2 * n, dim=axis)
    spectrum = spectrum.narrow(axis, 0, n)
    return spectrum.real * after_real - spectrum.imag * after_imaginary


def inverse_cosine(x: Tensor, axis: int, type: int, norm: str) -> Tensor:
    """``scipy.fft.idct``."""
    return cosine(x, axis, *inverse_of(type, norm))


def plane(x: Tensor, height: int, width: int, prefix_tokens: int) -> Tensor:
    """The tokens behind the prefix as ``[B, H, W, D]``, in float32 or float64."""
    return x[:, prefix_tokens:].to(compute_dtype(x)).reshape(x.shape[0], height, width, x.shape[2])


def separable_cosine(x: Tensor, type: int, norm: str, grid: bool) -> Tensor:
    """The DCT over the rows of ``x [B, H, W, D]``, and over its columns on a grid."""
    x = cosine(x, 2, type, norm)
    return cosine(x, 1, type, norm) if grid else x


def fourier(x: Tensor, norm: str, grid: bool) -> tuple[Tensor, Tensor]:
    """Real and imaginary part ``[B, H, W // 2 + 1, D]`` of the FFT of real ``x [B, H, W, D]``."""
    spectrum = _along(torch.fft.rfft, x, dim=2, norm=norm)
    if grid:
        spectrum = _along(torch.fft.fft, spectrum, dim=1, norm=norm)
    return spectrum.real.contiguous(), spectrum.imag.contiguous()


def inverse_fourier(real: Tensor, imaginary: Tensor, width: int, norm: str, grid: bool) -> Tensor:
    """``[B, H, W, D]`` from half a spectrum; what no real signal has is left out, on every device."""
    spectrum = torch.complex(real, imaginary)
    if grid:
        spectrum = _along(torch.fft.ifft, spectrum, dim=1, norm=norm)
    k = torch.arange(width // 2 + 1, device=real.device)[:, None]
    own_image = (k == 0) | (2 * k == width)
    spectrum = torch.complex(spectrum.real, spectrum.imag.masked_fill(own_image, 0))
    return _along(torch.fft.irfft, spectrum, n=width, dim=2, norm=norm)


def filtered(x: Tensor, weight: Tensor, grid: bool) -> Tensor:
    """``x [B, H, W, D]`` through a weight ``[H, W, D]`` (cosine) or ``[H, K, D, 2]`` (Fourier) per coefficient."""
    if weight.dim() == 3:
        return separable_cosine(separable_cosine(x, 2, "ortho", grid) * weight, 3, "ortho", grid)
    real, imaginary = fourier(x, "ortho", grid)
    weight_real, weight_imaginary = weight.unbind(-1)
    return inverse_fourier(
        real * weight_real - imaginary * weight_imaginary,
        real * weight_imaginary + imaginary * weight_real,
        x.shape[2],
        "ortho",
        grid,
    )


def band_energy(x: Tensor, members: Tensor, basis: str, grid: bool) -> Tensor:
    """``[B, bands, D]`` for ``members [bands, coefficients]``, how often each coefficient counts in each band."""
    if basis == "dct":
        power = separable_cosine(x, 2, "ortho", grid).square()
    else:
        real, imaginary = fourier(x, "ortho", grid)
        power = real.square() + imaginary.square()
    return product(members, power.flatten(1, 2))


def resized(x: Tensor, new_height: int, new_width: int, rescale: bool) -> Tensor:
    """``[B, h, w, D]``: the orthonormal DCT of ``x [B, H, W, D]``, cropped or padded by zeros, and back."""
    _, height, width, _ = x.shape
    spectrum = separable_cosine(x, 2, "ortho", True)[:, :new_height, :new_width]
    missing = (0, 0, 0, max(new_width - width, 0), 0, max(new_height - height, 0))
    result = separable_cosine(F.pad(spectrum, missing), 3, "ortho", True)
    return result * math.sqrt(new_height * new_width / (height * width)) if rescale else result


def _along(transform: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
    """``transform(x)``, also of an empty batch, which some libraries behind ``torch.fft`` refuse."""
    if x.shape[0]:
        return transform(x, **options)
    return transform(F.pad(x, (0, 0) * (x.dim() - 1) + (0, 1)), **options)[:0]
