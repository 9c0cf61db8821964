"""The spectral operators by ``scipy.fft`` in float64, written without any of our code, for kernels of every device.

Each function takes float64 tensors and the arguments of the operator of its name.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch

fft = pytest.importorskip("scipy.fft", reason="needs SciPy")

LENGTHS = (1, 2, 3, 7, 8, 13, 14, 16, 24, 27, 32, 49, 50, 77, 196, 197, 256, 257, 576, 577)
NORMS = ("ortho", "backward", "forward")


def _plane(x, grid, prefix):
    """The patches ``[B, *axes, D]`` and the numbers of their axes."""
    patches = x[:, prefix:].numpy()
    axes = grid or (patches.shape[1],)
    return patches.reshape(len(patches), *axes, patches.shape[2]), tuple(range(1, 1 + len(axes)))


def _tokens(x, plane, prefix):
    """The prefix of x, and a plane as tokens behind it."""
    tokens = np.asarray(plane).reshape(len(plane), int(np.prod(plane.shape[1:-1])), plane.shape[-1])
    return torch.cat((x[:, :prefix], torch.from_numpy(tokens)), 1)


def dct(x, type=2, grid=None, norm="ortho", prefix=0):
    plane, axes = _plane(x, grid, prefix)
    return _tokens(x, fft.dctn(plane, type, axes=axes, norm=norm), prefix)


def idct(x, type=2, grid=None, norm="ortho", prefix=0):
    plane, axes = _plane(x, grid, prefix)
    return _tokens(x, fft.idctn(plane, type, axes=axes, norm=norm), prefix)


def rfft(x, grid=None, norm="ortho", prefix=0):
    plane, axes = _plane(x, grid, prefix)
    spectrum = fft.rfftn(plane, axes=axes, norm=norm)
    return torch.from_numpy(spectrum.real.copy()), torch.from_numpy(spectrum.imag.copy())


def irfft(real, imag, n=None, grid=None, norm="ortho"):
    spectrum = real.numpy() + 1j * imag.numpy()
    axes = (1, 2) if grid else (1,)
    plane = fft.irfftn(spectrum, s=grid or (n,), axes=axes, norm=norm)
    return _tokens(real[:, :0].reshape(len(real), 0, real.shape[-1]), plane, 0)


def spectral_filter(x, weight, grid=None, basis="rfft", prefix=0):
    plane, axes = _plane(x, grid, prefix)
    weight = weight.numpy()
    if basis == "dct":
        return _tokens(x, fft.idctn(fft.dctn(plane, axes=axes) * weight, axes=axes), prefix)
    spectrum = fft.rfftn(plane, axes=axes) * (weight[..., 0] + 1j * weight[..., 1])
    return _tokens(x, fft.irfftn(spectrum, s=plane.shape[1:-1], axes=axes), prefix)


def _whole_spectrum(plane, axes, basis):
    return (fft.dctn if basis == "dct" else fft.fftn)(plane, axes=axes, norm="ortho")


def _squared_frequencies(shape, basis):
    """ρ² of every coefficient of the whole spectrum: integers over one integer."""
    count = 1
    for n in shape:
        count *= n
    total = np.zeros(shape, dtype=np.int64)
    for axis, n in enumerate(shape):
        k = np.arange(n)
        k = k if basis == "dct" else 2 * np.minimum(k, n - k)
        total += ((k * (count // n)) ** 2).reshape([-1 if other == axis else 1 for other in range(len(shape))])
    return total, len(shape) * count**2


def band_energy(x, bands, grid=None, basis="dct", prefix=0):
    """For a number of bands."""
    plane, axes = _plane(x, grid, prefix)
    power = abs(_whole_spectrum(plane, axes, basis)) ** 2
    frequencies, unit = _squared_frequencies(plane.shape[1:-1], basis)
    above = [frequencies * bands**2 >= edge**2 * unit for edge in range(bands)]
    masks = [lower & ~upper for lower, upper in zip(above, [*above[1:], np.zeros_like(above[0])], strict=True)]
    return torch.from_numpy(np.stack([(power * mask[..., None]).sum(axes) for mask in masks], 1))


def token_energy(x, cutoff, grid=None, basis="dct", prefix=0):
    plane, axes = _plane(x, grid, prefix)
    frequencies, unit = _squared_frequencies(plane.shape[1:-1], basis)
    limit = Fraction(cutoff) ** 2
    kept = np.array([Fraction(int(f), unit) >= limit for f in frequencies.flat]).reshape(frequencies.shape)
    spectrum = _whole_spectrum(plane, axes, basis) * kept[..., None]
    high = (fft.idctn if basis == "dct" else fft.ifftn)(spectrum, axes=axes, norm="ortho").real
    return _tokens(torch.zeros_like(x), high, prefix).square().sum(-1)


def spectral_resize(x, grid, new_grid, rescale=True, prefix=0):
    plane, axes = _plane(x, grid, prefix)
    (height, width), (new_height, new_width) = grid, new_grid
    kept = fft.dctn(plane, axes=axes, norm="ortho")[:, :new_height, :new_width]
    padding = [(0, 0), (0, new_height - kept.shape[1]), (0, new_width - kept.shape[2]), (0, 0)]
    resized = fft.idctn(np.pad(kept, padding), axes=axes, norm="ortho")
    return _tokens(x, resized * ((new_height * new_width / (height * width)) ** 0.5 if rescale else 1.0), prefix)
