"""Spectral operators on emulated CUDA against SciPy in float64: sizes, types, norms, channels and prefixes in turn."""

import math

import pytest
import scipy_truths as truths
import torch
from scipy_truths import LENGTHS, NORMS

import mlip_kernels
from mlip_kernels import use_reference
from mlip_kernels.testing import assert_as_accurate, assert_close

BACKENDS = ("triton", "cuda")
CASES = [
    pytest.param(
        n,
        2 + i % 3 if n == 1 else 1 + i % 4,
        NORMS[i % 3],
        (1, 3, 17, 65)[i % 4 if n < 100 else i % 2],
        (0, 1, 5)[i // 3 % 3],
    )
    for i, n in enumerate(LENGTHS)
]
AXES = (1, 2, 13, 50, 77, (1, 6), (5, 1), (2, 3), (7, 7), (13, 9), (14, 14))
BASES = ("dct", "rfft")


def tokens(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(cuda, ran, operator, inputs, truth):
    """``operator`` of the inputs on the kernel ``ran``, as accurate as plain PyTorch is."""
    with cuda:
        found = operator(*map(cuda.put, inputs))
    assert cuda.operators == [f"spectral_{ran}"]
    with use_reference():
        baseline, exact = operator(*inputs), operator(*(t.double() for t in inputs))
    pairs = [(r,) if isinstance(r, torch.Tensor) else r for r in (found, baseline, exact, truth)]
    # One scale for both parts of a spectrum: an imaginary part can be zero.
    found, baseline, exact, truth = (torch.cat([part.cpu() for part in parts]) for parts in pairs)
    assert_close(exact, truth, roundings=64)  # else a wrong baseline would excuse a wrong result
    assert_as_accurate(found, baseline, truth)


def problem(number, axes):
    """Tokens of which prefix and channels go with the number, and the arguments that say where the grid is."""
    grid = axes if isinstance(axes, tuple) else None
    channels, prefix = (17, 3, 65, 1)[number % 4], (1, 0, 5)[number % 3]
    x = tokens(2, prefix + (math.prod(grid) if grid else axes), channels)
    return x, {"grid": grid, "prefix_tokens": prefix}, {"grid": grid, "prefix": prefix}


@pytest.fixture(params=BACKENDS)
def cuda(request, needs_emulated):
    needs_emulated(request.param)
    from emulated_cuda import EmulatedCuda

    return EmulatedCuda(request.param, 80)


every_axes = pytest.mark.parametrize(("number", "axes"), list(enumerate(AXES)), ids=str)


@pytest.mark.parametrize("name", ["dct", "idct"])
@pytest.mark.parametrize(("size", "kind", "norm", "channels", "prefix"), CASES)
def test_cosine_transforms_of_the_token_axis(cuda, size, kind, norm, channels, prefix, name):
    x = tokens(2, prefix + size, channels)
    truth = getattr(truths, name)(x.double(), kind, norm=norm, prefix=prefix)

    def operator(x):
        return getattr(mlip_kernels, name)(x, type=kind, norm=norm, prefix_tokens=prefix)

    check(cuda, "separable", operator, [x], truth)


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
@pytest.mark.parametrize(("norm", "grid"), list(zip(NORMS, [(7, 7), (5, 8), (14, 14)], strict=True)), ids=str)
def test_cosine_transforms_of_grids(cuda, grid, norm, kind):
    x = tokens(2, 1 + grid[0] * grid[1], 17)
    truth = truths.dct(x.double(), kind, grid, norm, 1)

    def operator(x):
        return mlip_kernels.dct(x, type=kind, grid=grid, norm=norm, prefix_tokens=1)

    check(cuda, "separable", operator, [x], truth)


@every_axes
def test_rfft(cuda, number, axes):
    x, ours, theirs = problem(number, axes)
    norm = NORMS[number % 3]
    truth = truths.rfft(x.double(), norm=norm, **theirs)
    check(cuda, "analysis", lambda x: mlip_kernels.rfft(x, norm=norm, **ours), [x], truth)


@every_axes
def test_irfft_of_any_spectrum(cuda, number, axes):
    where = {"grid": axes} if isinstance(axes, tuple) else {"n": axes}
    *leading, last = axes if isinstance(axes, tuple) else (axes,)
    norm, shape = NORMS[number % 3], (2, *leading, last // 2 + 1, (17, 3, 65, 1)[number % 4])
    spectrum = [tokens(*shape), tokens(*shape).flip(0, -1)]
    truth = truths.irfft(*(part.double() for part in spectrum), norm=norm, **where)
    check(cuda, "synthesis", lambda r, i: mlip_kernels.irfft(r, i, norm=norm, **where), spectrum, truth)


@every_axes
@pytest.mark.parametrize("basis", BASES)
def test_filters(cuda, number, axes, basis):
    x, ours, theirs = problem(number, axes)
    *leading, last = axes if isinstance(axes, tuple) else (axes,)
    shape = (*leading, last // 2 + 1, x.shape[2], 2) if basis == "rfft" else (*leading, last, x.shape[2])
    weight = tokens(*shape)
    truth = truths.spectral_filter(x.double(), weight.double(), basis=basis, **theirs)
    check(cuda, "filtered", lambda x, w: mlip_kernels.spectral_filter(x, w, basis=basis, **ours), [x, weight], truth)


@every_axes
@pytest.mark.parametrize("basis", BASES)
def test_band_energies(cuda, number, axes, basis):
    x, ours, theirs = problem(number, axes)
    truth = truths.band_energy(x.double(), 5, basis=basis, **theirs)
    check(cuda, "band_energy", lambda x: mlip_kernels.band_energy(x, 5, basis=basis, **ours), [x], truth)


@every_axes
@pytest.mark.parametrize("basis", BASES)
def test_token_energies(cuda, number, axes, basis):
    x, ours, theirs = problem(number, axes)
    truth = truths.token_energy(x.double(), 0.37, basis=basis, **theirs)
    check(cuda, "token_energy", lambda x: mlip_kernels.token_energy(x, 0.37, basis=basis, **ours), [x], truth)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(
    ("grid", "new_grid"), [((1, 1), (3, 2)), ((5, 3), (2, 7)), ((7, 7), (14, 14)), ((13, 9), (1, 9))], ids=str
)
def test_resizing(cuda, grid, new_grid, rescale):
    x = tokens(2, 5 + math.prod(grid), 17)
    truth = truths.spectral_resize(x.double(), grid, new_grid, rescale, 5)

    def operator(x):
        return mlip_kernels.spectral_resize(x, grid, new_grid, rescale=rescale, prefix_tokens=5)

    check(cuda, "separable", operator, [x], truth)
