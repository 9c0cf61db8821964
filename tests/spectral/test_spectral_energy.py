"""Band and token energies against sums written out over the spectrum."""

import math
from fractions import Fraction

import pytest
import scipy.fft
import torch

from mlip_kernels.spectral import band_energy, dct, token_energy
from mlip_kernels.testing import assert_as_accurate, assert_close, assert_identical

BASES = ("dct", "rfft")
AXES = ((1,), (2,), (7,), (8,), (49,), (50,), (1, 1), (1, 6), (5, 1), (3, 3), (7, 7), (7, 8), (8, 7), (12, 14))


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def grid_of(axes):
    return axes if len(axes) == 2 else None


def whole_spectrum(x, axes, basis):
    """Squared orthonormal coefficients ``[B, *axes, D]``; for the FFT all of them, mirror images included."""
    array = x.numpy().reshape(x.shape[0], *axes, x.shape[2])
    dims = tuple(range(1, 1 + len(axes)))
    if basis == "dct":
        return torch.from_numpy(scipy.fft.dctn(array, axes=dims, norm="ortho")) ** 2
    return torch.from_numpy(abs(scipy.fft.fftn(array, axes=dims, norm="ortho"))) ** 2


def squared_frequency(index, axes, basis):
    """ρ² of one coefficient of the whole spectrum, exactly."""
    along = [
        Fraction(k, n) if basis == "dct" else Fraction(min(k, n - k), 1) / Fraction(n, 2)
        for k, n in zip(index, axes, strict=True)
    ]
    return sum(f * f for f in along) / len(axes)


def low_frequencies_removed(x, axes, cutoff, basis):
    array = x.numpy().reshape(x.shape[0], *axes, x.shape[2])
    dims = tuple(range(1, 1 + len(axes)))
    forward, inverse = (scipy.fft.dctn, scipy.fft.idctn) if basis == "dct" else (scipy.fft.fftn, scipy.fft.ifftn)
    spectrum = forward(array, axes=dims, norm="ortho")
    for index in torch.cartesian_prod(*(torch.arange(n) for n in axes)).reshape(-1, len(axes)).tolist():
        if squared_frequency(index, axes, basis) < Fraction(cutoff) ** 2:
            spectrum[(slice(None), *index)] = 0
    return torch.from_numpy(inverse(spectrum, axes=dims, norm="ortho").real).reshape(x.shape)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("axes", AXES)
def test_equal_bands_split_the_radius_evenly(axes, basis):
    x = tokens(2, math.prod(axes), 3)
    spectrum = whole_spectrum(x, axes, basis)
    for bands in (1, 2, 3, 5, 8):
        expected = torch.zeros(2, bands, 3, dtype=torch.float64)
        for index in torch.cartesian_prod(*(torch.arange(n) for n in axes)).reshape(-1, len(axes)).tolist():
            radius_squared = squared_frequency(index, axes, basis)
            band = sum(radius_squared >= Fraction(edge, bands) ** 2 for edge in range(1, bands))
            expected[:, band] += spectrum[(slice(None), *index)]
        assert_close(band_energy(x, bands, grid=grid_of(axes), basis=basis), expected, name=f"{bands} bands")


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("axes", AXES)
def test_bands_add_up_to_the_energy_of_the_tokens(axes, basis):
    x = tokens(2, math.prod(axes), 3)
    assert_close(band_energy(x, 6, grid=grid_of(axes), basis=basis).sum(1), x.square().sum(1))


def test_nyquist_lies_in_the_last_band():
    x = torch.tensor([1.0, -1.0]).repeat(4).reshape(1, 8, 1)
    assert_close(band_energy(x, 4, basis="rfft").flatten(), torch.tensor([0.0, 0.0, 0.0, 8.0]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("basis", BASES)
def test_bands_can_be_named_per_coefficient(basis, dtype):
    x, columns = tokens(2, 20, 3), 5 if basis == "dct" else 3
    bands = torch.randint(4, (4, columns), generator=torch.Generator().manual_seed(0), dtype=dtype)
    bands[0, 0] = 5
    spectrum = whole_spectrum(x, (4, 5), basis)
    if basis == "rfft":
        mirror = bands[-torch.arange(4) % 4][:, [2, 1]]
        named = torch.cat((bands, mirror), 1)
    else:
        named = bands
    expected = torch.stack([(spectrum * (named == band)[..., None]).sum((1, 2)) for band in range(6)], 1)
    assert_close(band_energy(x, bands, grid=(4, 5), basis=basis), expected)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("cutoff", [0.0, 0.25, 0.5, 0.7, 1.0])
def test_token_energy_is_what_the_high_frequencies_leave(cutoff, axes, basis):
    x = tokens(2, math.prod(axes), 3)
    high = low_frequencies_removed(x, axes, cutoff, basis)
    energy = token_energy(x, cutoff, grid=grid_of(axes), basis=basis)
    # A token without high frequencies keeps the rounding of those that were there.
    scale = x.square().sum(-1)
    assert_close(torch.cat((energy, scale)), torch.cat((high.square().sum(-1), scale)), roundings=32)


@pytest.mark.parametrize("basis", BASES)
def test_a_frequency_at_the_cutoff_is_kept(basis):
    for n, k in ((3, 1), (7, 3), (49, 14), (49, 21)):
        at = k / n if basis == "dct" else 2 * k / n
        wave = torch.zeros(1, n, 1, dtype=torch.float64)
        wave[0, k] = 1
        wave = dct(wave, type=3) if basis == "dct" else torch.fft.irfft(wave[:, : n // 2 + 1] + 0j, n, dim=1)
        for grid in ((n, 1), None):
            cutoff = at if grid is None else math.sqrt(at**2 / 2)
            assert token_energy(wave, cutoff * (1 - 1e-9), grid=grid, basis=basis).sum() > 0
        assert_close(token_energy(wave, at, basis=basis), wave.square().sum(-1))
        assert token_energy(wave, at * (1 + 1e-9), basis=basis).max() < wave.square().max() / 2**40


@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("basis", BASES)
def test_prefix_tokens_have_no_energy(basis, prefix):
    x = tokens(2, prefix + 12, 3)
    options = {"grid": (3, 4), "basis": basis}
    assert_identical(band_energy(x, 3, prefix_tokens=prefix, **options), band_energy(x[:, prefix:], 3, **options))
    energy = token_energy(x, 0.3, prefix_tokens=prefix, **options)
    assert not energy[:, :prefix].any()
    assert_identical(energy[:, prefix:], token_energy(x[:, prefix:], 0.3, **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_result_dtypes(dtype):
    x = tokens(2, 12, 3, dtype=dtype)
    assert band_energy(x, 3).dtype == dtype
    assert token_energy(x, 0.5).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype not in (torch.float64, torch.float32):
        assert_identical(band_energy(x, 3), band_energy(x.float(), 3).to(dtype))
        assert_identical(token_energy(x, 0.5), token_energy(x.float(), 0.5))


@pytest.mark.parametrize("grid", [(7, 7), (24, 24)])
def test_error_in_float32_is_at_most_twice_that_of_torch(grid):
    height, width = grid
    x = tokens(2, height * width, 17, dtype=torch.float32)
    bands = torch.randint(3, (height, width), generator=torch.Generator().manual_seed(0))
    bands = torch.minimum(bands, bands[-torch.arange(height) % height][:, -torch.arange(width) % width])

    def with_torch_fft(x):
        power = torch.fft.fft2(x.view(2, *grid, 17), dim=(1, 2), norm="ortho").abs().square().flatten(1, 2)
        return torch.zeros(2, 3, 17, dtype=x.dtype).index_add_(1, bands.flatten(), power)

    actual = band_energy(x, bands[:, : width // 2 + 1], grid=grid, basis="rfft")
    assert_as_accurate(actual, with_torch_fft(x), with_torch_fft(x.double()))
