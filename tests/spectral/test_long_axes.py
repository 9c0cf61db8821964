"""Axes of more than 1,024 points, which torch.fft transforms: values, accuracy, derivatives, graphs, cost."""

import math
import time

import pytest
import scipy_truths as truths
import torch

from mlip_kernels import spectral
from mlip_kernels.spectral import constants
from mlip_kernels.testing import DTYPES, assert_as_accurate, assert_close, assert_identical, gradients, permuted

PRIME, POWER = 1511, 4096
LENGTHS = (1025, PRIME, POWER)
GRIDS = ((2, 1031), (1200, 3))
AXES = (*LENGTHS, *GRIDS)
NORMS = ("ortho", "backward", "forward")


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(axes, prefix=1, batch=2, channels=2, dtype=torch.float64):
    """Tokens with a prefix, and the arguments that say where the grid is, for us and for the truths."""
    grid = axes if isinstance(axes, tuple) else None
    x = random(batch, prefix + (math.prod(grid) if grid else axes), channels, dtype=dtype)
    return x, {"grid": grid, "prefix_tokens": prefix}, {"grid": grid, "prefix": prefix}


def filter_weight(axes, basis, channels=2):
    *leading, last = axes if isinstance(axes, tuple) else (axes,)
    return random(*leading, *((last // 2 + 1, channels, 2) if basis == "rfft" else (last, channels)), seed=1)


@pytest.mark.parametrize("type", [1, 2, 3, 4])
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_cosine_transforms_equal_those_of_scipy(axes, type):
    for norm in NORMS:
        x, ours, theirs = problem(axes)
        for name in ("dct", "idct"):
            found = getattr(spectral, name)(permuted(x), type=type, norm=norm, **ours)
            assert_close(
                found, getattr(truths, name)(x, type, norm=norm, **theirs), roundings=64, name=f"{name} {norm}"
            )
            assert_identical(found[:, :1], x[:, :1])


@pytest.mark.parametrize("type", [1, 2, 3, 4])
def test_long_channels_are_transformed_too(type):
    x = random(2, 3, PRIME)
    expected = truths.dct(x.mT, type).mT
    assert_close(spectral.dct(x, type=type, dim=2), expected, roundings=64)
    assert_close(spectral.idct(expected, type=type, dim=-1), x, roundings=64)


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_fourier_transforms_equal_those_of_scipy(axes):
    for norm in NORMS:
        x, ours, theirs = problem(axes)
        found, expected = spectral.rfft(permuted(x), norm=norm, **ours), truths.rfft(x, norm=norm, **theirs)
        assert_close(torch.cat(found), torch.cat(expected), roundings=64)
        if ours["grid"] is None:
            assert not found[1][:, 0].any()
            assert axes % 2 or not found[1][:, -1].any()
        real, imaginary = (random(*found[0].shape, seed=seed) for seed in (1, 2))  # no real signal has this spectrum
        where = {"grid": axes} if isinstance(axes, tuple) else {"n": axes}
        expected = truths.irfft(real, imaginary, norm=norm, **where)
        assert_close(spectral.irfft(real, imaginary, norm=norm, **where), expected, roundings=64)


@pytest.mark.parametrize("basis", ["dct", "rfft"])
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_filters_and_energies_equal_those_of_scipy(axes, basis):
    x, ours, theirs = problem(axes)
    weight = filter_weight(axes, basis)
    found = spectral.spectral_filter(x, weight, basis=basis, **ours)
    assert_close(found, truths.spectral_filter(x, weight, basis=basis, **theirs), roundings=64)
    found = spectral.band_energy(x, 5, basis=basis, **ours)
    assert_close(found, truths.band_energy(x, 5, basis=basis, **theirs), roundings=64)
    found = spectral.token_energy(x, 0.37, basis=basis, **ours)
    assert_close(found, truths.token_energy(x, 0.37, basis=basis, **theirs), roundings=64)


@pytest.mark.parametrize(("grid", "new_grid"), [((2, 1031), (3, 1027)), ((1200, 3), (5, 4)), ((4, 5), (2000, 3))])
def test_resizing_equals_that_of_scipy(grid, new_grid):
    x, _, theirs = problem(grid)
    for rescale in (True, False):
        found = spectral.spectral_resize(x, grid, new_grid, rescale=rescale, prefix_tokens=1)
        assert_close(found, truths.spectral_resize(x, new_grid=new_grid, rescale=rescale, **theirs), roundings=64)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("n", [1025, PRIME])
def test_error_is_at_most_twice_that_of_torch(n, dtype):
    """Of torch.fft for the Fourier transform, of a product with the matrix for the cosine transforms."""
    x = random(2, n, 16, dtype=dtype)
    plain = torch.fft.rfft(x.float(), dim=1, norm="ortho")
    baseline, truth = torch.cat((plain.real, plain.imag)).to(dtype), torch.cat(truths.rfft(x.double()))
    assert_as_accurate(torch.cat(spectral.rfft(x)), baseline, truth, name="rfft")
    for type in (1, 2, 3, 4):
        matrix = truths.dct(torch.eye(n, dtype=torch.float64)[None], type)[0]
        found = spectral.dct(x, type=type)
        assert found.dtype == dtype
        assert_as_accurate(found, matrix.to(dtype) @ x, matrix @ x.double(), name=f"type {type}")


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    weight = filter_weight(1026, "rfft").float()

    def operator(x):
        return spectral.token_energy(spectral.spectral_filter(x, weight, prefix_tokens=1), 0.4, prefix_tokens=1)

    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    x = problem(1026, dtype=torch.float32)[0]
    assert_close(compiled(x), operator(x))
    assert_close(gradients(compiled, [x])[0], gradients(operator, [x])[0], roundings=32)


def test_a_compiled_function_serves_short_and_long_axes():
    torch._dynamo.reset()
    compiled = torch.compile(spectral.dct, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (20, 1100, 30):
        x = random(1, n, 2)
        assert_close(compiled(x), spectral.dct(x), roundings=64)


def test_an_exported_graph_serves_short_and_long_axes():
    class Transform(torch.nn.Module):
        def forward(self, x):
            return spectral.dct(x)

    tokens = torch.export.Dim("tokens", min=2)
    exported = torch.export.export(Transform(), (random(1, 13, 2),), dynamic_shapes={"x": {1: tokens}}).module()
    for n in (7, 1030):
        x = random(1, n, 2)
        assert_close(exported(x), spectral.dct(x), roundings=64)
    fixed = torch.export.export(Transform(), (random(1, 1030, 2),))
    assert any("fft" in str(node.target) for node in fixed.graph.nodes)


def test_a_long_axis_costs_no_matrix():
    constants._remembered.cache_clear()
    x = random(1, 2**17, 1, dtype=torch.float32)  # as a matrix: 64 GiB
    start = time.process_time()
    weight = torch.tensor((1.0, 0.0)).repeat(2**16 + 1, 1, 1)
    assert_close(spectral.idct(spectral.dct(x)), x, roundings=32)
    assert_close(spectral.spectral_filter(x, weight), x, roundings=32)
    assert_close(spectral.band_energy(x, 8).sum(1), x.square().sum(1), roundings=64)
    assert time.process_time() - start < 20
    assert constants._remembered.cache_info().bytes < 64 * x.nbytes
