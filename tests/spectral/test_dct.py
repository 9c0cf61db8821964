"""DCT and its inverse: what they promise beside their values, which test_spectral_scipy.py compares."""

import itertools

import pytest
import scipy.fft
import torch

from mlip_kernels.spectral import dct, idct
from mlip_kernels.testing import assert_as_accurate, assert_close, assert_identical

TYPES = (1, 2, 3, 4)
NORMS = ("ortho", "backward", "forward")
KINDS = list(itertools.product(NORMS, ((dct, scipy.fft.dct), (idct, scipy.fft.idct))))


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("channels", [1, 3, 17, 65])
def test_prefix_tokens_are_copied_through(channels, prefix):
    x = tokens(2, prefix + 12, channels, dtype=torch.bfloat16)
    for options in ({"grid": (3, 4)}, {}, {"dim": 2}):
        y = dct(x, prefix_tokens=prefix, **options)
        assert_identical(y[:, :prefix], x[:, :prefix])
        assert_identical(y[:, prefix:], dct(x[:, prefix:], **options))


@pytest.mark.parametrize("dim", [2, -1])
def test_channels_can_be_transformed_too(dim):
    x = tokens(2, 5, 7)
    for norm, (ours, theirs) in KINDS:
        y = ours(x, type=3, dim=dim, norm=norm)
        assert_close(y, torch.from_numpy(theirs(x.numpy(), 3, axis=2, norm=norm)))
        assert y.is_contiguous()


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("norm", [*NORMS, None])
def test_idct_inverts_dct(norm, type):
    x = tokens(2, 56, 3)
    for options in ({"grid": (7, 8)}, {}):
        assert_close(idct(dct(x, type=type, norm=norm, **options), type=type, norm=norm, **options), x)


def test_no_norm_means_backward():
    x = tokens(1, 7, 2)
    assert_identical(dct(x, norm=None), dct(x, norm="backward"))


@pytest.mark.parametrize("type", TYPES)
def test_orthonormal_transform_keeps_the_energy(type):
    x = tokens(2, 56, 3)
    assert_close(dct(x, type=type, grid=(7, 8)).square().sum(1), x.square().sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [7, 49, 197, 577])
def test_error_is_at_most_twice_that_of_matmul_in_the_same_dtype(n, dtype):
    x = tokens(2, n, 33, dtype=dtype)
    matrix = torch.from_numpy(scipy.fft.dct(torch.eye(n, dtype=torch.float64).numpy(), axis=0, norm="ortho"))
    truth = matrix @ x.double()
    actual = dct(x)
    assert actual.dtype == dtype
    assert_as_accurate(actual, matrix.to(dtype) @ x, truth)


@pytest.mark.parametrize("type", TYPES)
def test_orthonormal_gradient_is_the_inverse(type):
    x, cotangent = tokens(2, 12, 3), tokens(2, 12, 3).flip(0)
    leaf = x.requires_grad_()
    (gradient,) = torch.autograd.grad(dct(leaf, type=type, grid=(3, 4)), leaf, cotangent)
    assert_close(gradient, idct(cotangent, type=type, grid=(3, 4)))
