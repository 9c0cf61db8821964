"""The largest tokens for which nothing overflows, as documented in mlip_kernels.spectral, and what lies beyond."""

import math

import pytest
import torch

from mlip_kernels import spectral, use_reference

AXES = (1, 2, 3, 14, 49, 197, (7, 8), (24, 27))
LONG = (1025, 1511, (2, 1031))
PATTERNS = {
    "constant": torch.ones_like,
    "alternating": lambda x: torch.ones_like(x) - 2.0 * (torch.arange(x.shape[1]) % 2)[:, None],
    "random signs": lambda x: torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).sign(),
}


def linear(axes, channels=2):
    grid = axes if isinstance(axes, tuple) else None
    *leading, last = grid or (axes,)
    weight = torch.tensor((1.0, 0.0)).repeat(*leading, last // 2 + 1, channels, 1)
    height, width = grid or (1, axes)
    yield "rfft", lambda x, norm: torch.cat(spectral.rfft(x, grid=grid, norm=norm))
    yield "filter", lambda x, norm: spectral.spectral_filter(x, weight, grid=grid)
    yield "resize", lambda x, norm: spectral.spectral_resize(x, (height, width), (height + 1, width - width // 2))
    for type in (1, 2, 3, 4):
        if type > 1 or min(grid or (axes,)) > 1:
            yield f"dct {type}", lambda x, norm, type=type: spectral.dct(x, type=type, grid=grid, norm=norm)
            yield f"idct {type}", lambda x, norm, type=type: spectral.idct(x, type=type, grid=grid, norm=norm)


def energies(axes):
    grid = axes if isinstance(axes, tuple) else None
    for basis in ("dct", "rfft"):
        yield f"band_energy {basis}", lambda x, norm, basis=basis: spectral.band_energy(x, 2, grid=grid, basis=basis)
        yield f"token_energy {basis}", lambda x, norm, basis=basis: spectral.token_energy(x, 0, grid=grid, basis=basis)


def assert_finite(operators, axes, largest, gradient, dtype, channels=2):
    n = math.prod(axes) if isinstance(axes, tuple) else axes
    for label, pattern in PATTERNS.items():
        for name, operator in operators:
            for norm in ("ortho", "backward", "forward"):
                x = (pattern(torch.empty(1, n, channels)) * largest).to(dtype).requires_grad_()
                y = operator(x, norm)
                assert y.isfinite().all(), (label, name, norm)
                cotangent = (pattern(y.reshape(1, -1, 1)) * gradient).reshape(y.shape).to(y.dtype)
                assert torch.autograd.grad(y, x, cotangent)[0].isfinite().all(), (label, name, norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_linear_operators_are_finite_up_to_what_is_documented(axes, dtype):
    largest = 2e37 / (math.prod(axes) if isinstance(axes, tuple) else axes)
    assert_finite(list(linear(axes)), axes, largest, largest, dtype)
    with use_reference():
        assert_finite(list(linear(axes)), axes, largest, largest, dtype)


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_amplitude_and_phase_are_finite_up_to_what_is_documented(axes):
    grid, n = (axes, math.prod(axes)) if isinstance(axes, tuple) else (None, axes)
    operator = "amplitude_phase", lambda x, norm: torch.cat(spectral.amplitude_phase(x, grid=grid))
    assert_finite([operator], axes, 2e37 / n, 1.0, torch.float32)


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_energies_are_finite_up_to_what_is_documented(axes):
    largest = 1e18 / math.sqrt((math.prod(axes) if isinstance(axes, tuple) else axes) * 2)
    assert_finite(list(energies(axes)), axes, largest, 1.0, torch.float32)


@pytest.mark.parametrize("axes", LONG, ids=str)
def test_long_axes_are_finite_up_to_what_is_documented(axes):
    assert_finite(list(linear(axes)), axes, 1e9, 1e9, torch.float32)
    assert_finite(list(energies(axes)), axes, 1e9, 1.0, torch.float32)


def test_beyond_the_range_a_transform_overflows():
    assert not spectral.dct(torch.full((1, 16, 1), 3e38)).isfinite().all()
