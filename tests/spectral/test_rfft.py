"""Planar real FFT and its inverse against torch.fft in float64."""

import math

import pytest
import torch

from mlip_kernels.spectral import irfft, rfft
from mlip_kernels.testing import assert_as_accurate, assert_close, assert_identical

LENGTHS = (1, 2, 7, 8, 50, 197)
GRIDS = ((1, 1), (1, 6), (5, 1), (2, 3), (7, 7), (7, 8), (8, 7), (13, 14), (24, 27), (32, 5))
NORMS = ("ortho", "backward", "forward")


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_spectrum(actual, expected, n):
    assert_close(torch.cat(actual), torch.cat((expected.real, expected.imag)), roundings=8 + math.sqrt(n))
    assert all(part.is_contiguous() for part in actual)


@pytest.mark.parametrize("n", LENGTHS)
def test_equals_torch_over_the_token_axis(n):
    x = tokens(2, n, 3)
    # A spectrum that no real signal has: torch.fft on the CPU ignores the imaginary part of DC and Nyquist.
    real, imag = tokens(2, n // 2 + 1, 3, seed=1), tokens(2, n // 2 + 1, 3, seed=2)
    for norm in NORMS:
        assert_spectrum(rfft(x, norm=norm), torch.fft.rfft(x, dim=1, norm=norm), n)
        expected = torch.fft.irfft(torch.complex(real, imag), n, dim=1, norm=norm)
        assert_close(irfft(real, imag, n=n, norm=norm), expected, roundings=8 + math.sqrt(n))


@pytest.mark.parametrize("grid", GRIDS)
def test_equals_torch_over_the_grid(grid):
    height, width = grid
    x = tokens(2, height * width, 17)
    shape = (2, height, width // 2 + 1, 17)
    real, imag = tokens(*shape, seed=1), tokens(*shape, seed=2)
    for norm in NORMS:
        expected = torch.fft.rfft2(x.view(2, height, width, 17), dim=(1, 2), norm=norm)
        assert_spectrum(rfft(x, grid=grid, norm=norm), expected, height * width)
        expected = torch.fft.irfft2(torch.complex(real, imag), s=grid, dim=(1, 2), norm=norm).reshape(x.shape)
        assert_close(irfft(real, imag, grid=grid, norm=norm), expected)


@pytest.mark.parametrize("norm", [*NORMS, None])
def test_irfft_inverts_rfft(norm):
    for n in (8, 9):
        x = tokens(2, n, 3)
        assert_close(irfft(*rfft(x, norm=norm), n=n, norm=norm), x)
    assert_close(irfft(*rfft(tokens(2, 8, 3), norm=norm), norm=norm), tokens(2, 8, 3))
    assert_close(irfft(*rfft(tokens(2, 35, 3), grid=(5, 7), norm=norm), grid=(5, 7), norm=norm), tokens(2, 35, 3))


def test_imaginary_part_of_dc_and_nyquist_is_exactly_zero():
    for n in (1, 2, 50, 196):
        imag = rfft(tokens(2, n, 3, dtype=torch.float32))[1]
        assert not imag[:, [0, n // 2]].any()


@pytest.mark.parametrize("prefix", [1, 5])
def test_prefix_tokens_are_left_out(prefix):
    x = tokens(2, prefix + 12, 3)
    for options in ({"grid": (3, 4)}, {}):
        for actual, expected in zip(
            rfft(x, prefix_tokens=prefix, **options), rfft(x[:, prefix:], **options), strict=True
        ):
            assert_identical(actual, expected)


@pytest.mark.parametrize("n", [7, 49, 196, 197, 577])
def test_error_in_float32_is_at_most_twice_that_of_torch(n):
    x = tokens(4, n, 33, dtype=torch.float32)
    truth = torch.fft.rfft(x.double(), dim=1, norm="ortho")
    baseline = torch.fft.rfft(x, dim=1, norm="ortho")
    real, imag = rfft(x)
    assert_as_accurate(real, baseline.real, truth.real)
    assert_as_accurate(imag, baseline.imag, truth.imag)
    assert_as_accurate(irfft(real, imag, n=n), torch.fft.irfft(baseline, n, dim=1, norm="ortho"), x.double())


@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (5, 6)])
def test_gradient_of_irfft_equals_that_of_torch(grid):
    height, width = grid
    shape = (2, height, width // 2 + 1, 3)
    real, imag = (tokens(*shape, seed=seed).requires_grad_() for seed in (1, 2))
    cotangent = tokens(2, height * width, 3, seed=3)
    ours = torch.autograd.grad(irfft(real, imag, grid=grid), (real, imag), cotangent)
    theirs = torch.fft.irfft2(torch.complex(real, imag), s=grid, dim=(1, 2), norm="ortho").reshape(cotangent.shape)
    for actual, expected in zip(ours, torch.autograd.grad(theirs, (real, imag), cotangent), strict=True):
        assert_close(actual, expected)
