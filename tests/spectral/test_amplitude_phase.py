"""Amplitude and phase: exact values, gradients that are finite everywhere."""

import pytest
import torch

from mlip_kernels.spectral import amplitude_phase
from mlip_kernels.testing import assert_close, assert_identical, gradients


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("grid", [(3, 4), (7, 7), (5, 1), None])
def test_equals_abs_and_angle(grid):
    n = 12 if grid is None else grid[0] * grid[1]
    x = tokens(2, n, 3)
    if grid is None:
        spectrum = torch.fft.rfft(x, dim=1, norm="ortho")
    else:
        spectrum = torch.fft.rfft2(x.view(2, *grid, 3), dim=(1, 2), norm="ortho")
    amplitude, phase = amplitude_phase(x, grid=grid)
    assert_close(amplitude, spectrum.abs())
    # A real coefficient has the phase 0, π or -π, the sign being that of a rounding error: compare on the circle.
    assert_close(phase.cos(), spectrum.angle().cos())
    assert_close(phase.sin(), spectrum.angle().sin())


def test_gradients_equal_those_of_abs_and_angle():
    x = tokens(2, 15, 3)

    def with_torch(x):
        spectrum = torch.fft.rfft(x, dim=1, norm="ortho")[:, 1:]
        return spectrum.abs(), spectrum.angle()

    ours = gradients(lambda x: [part[:, 1:] for part in amplitude_phase(x)], [x])
    assert_close(ours[0], gradients(with_torch, [x])[0], roundings=64)


@pytest.mark.parametrize("grid", [(4, 4), (14, 14), None])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_tokens_have_finite_gradients(value, grid):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.full((2, 16 if grid is None else grid[0] * grid[1], 3), value, dtype=dtype)
        for part in (0, 1):
            (gradient,) = gradients(lambda x, part=part: amplitude_phase(x, grid=grid, eps=1e-4)[part], [x])
            assert gradient.isfinite().all()
            assert gradient.abs().max() <= 1e3


def test_zero_tokens_have_zero_amplitude_phase_and_gradient():
    x = torch.zeros(1, 12, 2)
    for eps in (0.0, 1e-6):
        assert not torch.cat(amplitude_phase(x, grid=(3, 4), eps=eps)).any()
        assert not gradients(lambda x, eps=eps: amplitude_phase(x, grid=(3, 4), eps=eps), [x])[0].any()


def test_below_eps_values_stay_exact_and_gradients_are_zero():
    x = tokens(2, 15, 3)
    eps = float(amplitude_phase(x)[0].median())
    below = amplitude_phase(x)[0] < eps
    for part in (0, 1):
        assert_identical(amplitude_phase(x, eps=eps)[part], amplitude_phase(x)[part])

        def gradient(where, part=part, **options):
            return gradients(lambda x: amplitude_phase(x, **options)[part] * where, [x])[0]

        assert gradient(below).any()
        assert not gradient(below, eps=eps).any()
        assert_identical(gradient(~below, eps=eps), gradient(~below))


def test_tiny_and_huge_tokens_have_finite_gradients():
    for scale in (1e-30, 1e-22, 1e-18, 1e18, 1e30):
        x = tokens(2, 12, 3, dtype=torch.float32) * scale
        assert gradients(lambda x: amplitude_phase(x, eps=0.0), [x])[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prefix_tokens_are_left_out_and_dtype_is_kept(dtype):
    x = tokens(2, 17, 3, dtype=dtype)
    parts = amplitude_phase(x, grid=(3, 4), prefix_tokens=5)
    for actual, expected in zip(parts, amplitude_phase(x[:, 5:], grid=(3, 4)), strict=True):
        assert actual.dtype == dtype
        assert actual.shape == (2, 3, 3, 3)
        assert_identical(actual, expected)
    assert amplitude_phase(x[:0])[0].shape == (0, 9, 3)
