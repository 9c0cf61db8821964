"""Every spectral operator against SciPy in float64: sizes, types and norms with channels, prefixes and layouts."""

import itertools
import math

import pytest
import scipy_truths as truths
import torch
from scipy_truths import LENGTHS, NORMS

from mlip_kernels import spectral
from mlip_kernels.testing import assert_close, assert_identical, permuted, threads

CHANNELS, PREFIXES = (1, 3, 17, 65), (0, 1, 5)
GRIDS = ((1, 1), (1, 6), (5, 1), (2, 3), (7, 7), (7, 8), (8, 7), (13, 14), (16, 16), (24, 27), (32, 5))
AXES = (*LENGTHS, *GRIDS)
BASES = ("dct", "rfft")


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems would spend their time waiting for a second one."""
    with threads(1):
        yield


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def every_second_channel(x):
    return x.repeat_interleave(2, -1)[..., ::2]


LAYOUTS = (torch.Tensor.contiguous, permuted, every_second_channel)


def problem(axes, channels=17, prefix=1):
    """Tokens with a prefix, and the arguments that say where the grid is."""
    grid = axes if isinstance(axes, tuple) else None
    x = random(2, prefix + (math.prod(grid) if grid else axes), channels)
    return x, {"grid": grid, "prefix_tokens": prefix}, {"grid": grid, "prefix": prefix}


def roundings(x):
    return 16 + math.sqrt(x.shape[1])


@pytest.mark.parametrize("type", [1, 2, 3, 4])
@pytest.mark.parametrize("n", LENGTHS)
def test_dct_and_idct_over_the_token_axis(n, type):
    if type == 1 and n == 1:
        pytest.skip("is not defined")
    pairs = list(itertools.product(CHANNELS, PREFIXES))
    cases = itertools.cycle(zip(pairs, LAYOUTS * 4, strict=True))
    for name, norm in itertools.product(("dct", "idct"), NORMS):
        ours, theirs = getattr(spectral, name), getattr(truths, name)
        for (channels, prefix), layout in itertools.islice(cases, len(pairs) if n < 100 else 2):
            x = random(2, prefix + n, channels)
            found = ours(layout(x), type=type, norm=norm, prefix_tokens=prefix)
            expected = theirs(x, type, norm=norm, prefix=prefix)
            assert_close(found, expected, roundings=8 + math.sqrt(n), name=f"{name} {norm} {channels} {prefix}")
            assert_identical(found[:, :prefix], x[:, :prefix])
        assert ours(x[:0], type=type, norm=norm, prefix_tokens=prefix).shape == (0, prefix + n, channels)


@pytest.mark.parametrize("type", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_dct_and_idct_over_grids(grid, type):
    if type == 1 and min(grid) == 1:
        pytest.skip("is not defined")
    cases = itertools.cycle(zip(CHANNELS * 3, PREFIXES * 4, LAYOUTS * 4, strict=True))
    for name, norm in itertools.product(("dct", "idct"), NORMS):
        channels, prefix, layout = next(cases)
        x, ours, theirs = problem(grid, channels, prefix)
        found = getattr(spectral, name)(layout(x), type=type, norm=norm, **ours)
        expected = getattr(truths, name)(x, type, norm=norm, **theirs)
        assert_close(found, expected, roundings=roundings(x), name=f"{name} {norm}")


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_rfft_and_irfft(axes):
    for norm, channels, prefix, layout in zip(NORMS, CHANNELS[1:], PREFIXES, LAYOUTS, strict=True):
        x, ours, theirs = problem(axes, channels, prefix)
        found, expected = spectral.rfft(layout(x), norm=norm, **ours), truths.rfft(x, norm=norm, **theirs)
        assert_close(torch.cat(found), torch.cat(expected), roundings=roundings(x))
        # A spectrum that no real signal has.
        real, imag = (random(*found[0].shape, seed=seed) for seed in (1, 2))
        where = {"grid": axes} if isinstance(axes, tuple) else {"n": axes}
        found = spectral.irfft(layout(real), layout(imag), norm=norm, **where)
        assert_close(found, truths.irfft(real, imag, norm=norm, **where), roundings=roundings(x))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_filter(axes, basis):
    for channels, prefix, layout in zip(CHANNELS[1:], PREFIXES, LAYOUTS, strict=True):
        x, ours, theirs = problem(axes, channels, prefix)
        *leading, last = axes if isinstance(axes, tuple) else (axes,)
        shape = (*leading, last // 2 + 1, channels, 2) if basis == "rfft" else (*leading, last, channels)
        weight = random(*shape, seed=1)
        expected = truths.spectral_filter(x, weight, basis=basis, **theirs)
        found = spectral.spectral_filter(layout(x), permuted(weight), basis=basis, **ours)
        assert_close(found, expected, roundings=roundings(x))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_energies(axes, basis):
    for channels, prefix, layout in zip(CHANNELS[1:], PREFIXES, LAYOUTS, strict=True):
        x, ours, theirs = problem(axes, channels, prefix)
        found = spectral.band_energy(layout(x), 5, basis=basis, **ours)
        assert_close(found, truths.band_energy(x, 5, basis=basis, **theirs), roundings=roundings(x))
        # A token without high frequencies keeps the rounding of those that were there.
        scale = x.square().sum(-1)
        found = spectral.token_energy(layout(x), 0.37, basis=basis, **ours)
        expected = truths.token_energy(x, 0.37, basis=basis, **theirs)
        assert_close(torch.cat((found, scale)), torch.cat((expected, scale)), roundings=roundings(x))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_resize(grid):
    for new_grid, prefix, layout in zip(((1, 2), (9, 7), (14, 33)), PREFIXES, LAYOUTS, strict=True):
        for rescale in (True, False):
            x, _, theirs = problem(grid, 17, prefix)
            found = spectral.spectral_resize(layout(x), grid, new_grid, rescale=rescale, prefix_tokens=prefix)
            expected = truths.spectral_resize(x, new_grid=new_grid, rescale=rescale, **theirs)
            assert_close(found, expected, roundings=roundings(x))
