"""Spectral filter against the GFNet layer on CPU torch.fft, and against scipy."""

import pytest
import scipy.fft
import torch

from mlip_kernels.spectral import dct, idct, spectral_filter
from mlip_kernels.testing import assert_as_accurate, assert_close, assert_identical, gradients

GRIDS = ((1, 1), (1, 6), (5, 1), (2, 2), (3, 3), (7, 7), (7, 8), (8, 7), (14, 14), (13, 16), (24, 27))


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def global_filter(x, weight, grid):
    """The layer of GFNet in plain torch.fft."""
    image = x.reshape(x.shape[0], *grid, x.shape[2])
    spectrum = torch.fft.rfft2(image, dim=(1, 2), norm="ortho") * torch.view_as_complex(weight)
    return torch.fft.irfft2(spectrum, s=grid, dim=(1, 2), norm="ortho").reshape(x.shape)


def sequence_filter(x, weight):
    spectrum = torch.fft.rfft(x, dim=1, norm="ortho") * torch.view_as_complex(weight)
    return torch.fft.irfft(spectrum, n=x.shape[1], dim=1, norm="ortho")


@pytest.mark.parametrize("grid", GRIDS)
def test_equals_gfnet_forward_and_backward(grid):
    height, width = grid
    x, weight = tokens(3, height * width, 5), tokens(height, width // 2 + 1, 5, 2, seed=1)
    assert_close(spectral_filter(x, weight, grid=grid), global_filter(x, weight, grid))
    ours = gradients(lambda x, w: spectral_filter(x, w, grid=grid), [x, weight])
    theirs = gradients(lambda x, w: global_filter(x, w, grid), [x, weight])
    for actual, expected, name in zip(ours, theirs, ("dx", "dW"), strict=True):
        assert_close(actual, expected, name=name)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 49, 50, 77, 196, 197])
def test_equals_torch_over_the_token_axis(n):
    x, weight = tokens(2, n, 3), tokens(n // 2 + 1, 3, 2, seed=1)
    assert_close(spectral_filter(x, weight), sequence_filter(x, weight))
    ours = gradients(spectral_filter, [x, weight])
    for actual, expected in zip(ours, gradients(sequence_filter, [x, weight]), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("width", [6, 7])
def test_dc_and_nyquist_columns_act_as_their_hermitian_part(width):
    height, own_image = 5, [0, 3] if width == 6 else [0]
    x, weight = tokens(2, height * width, 3), tokens(height, width // 2 + 1, 3, 2, seed=1)
    mirror = -torch.arange(height) % height
    conjugate = weight[mirror] * torch.tensor([1.0, -1.0])
    hermitian = weight.clone()
    hermitian[:, own_image] = (weight + conjugate)[:, own_image] / 2
    assert not torch.equal(hermitian, weight)
    grid = (height, width)
    assert_close(spectral_filter(x, weight, grid=grid), spectral_filter(x, hermitian, grid=grid))
    gradient = gradients(lambda x, w: spectral_filter(x, w, grid=grid), [x, weight])[1][:, own_image]
    assert_close(gradient, gradient[mirror] * torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("grid", [(7, 8), None])
def test_dct_basis_weights_cosine_coefficients(grid):
    x = tokens(2, 56, 3)
    weight = tokens(*(grid or (56,)), 3, seed=1)
    array = x.numpy().reshape(2, *(grid or (56,)), 3)
    axes = (1, 2) if grid else (1,)
    spectrum = scipy.fft.dctn(array, axes=axes, norm="ortho") * weight.numpy()
    expected = torch.from_numpy(scipy.fft.idctn(spectrum, axes=axes, norm="ortho")).reshape(x.shape)
    assert_close(spectral_filter(x, weight, grid=grid, basis="dct"), expected)


@pytest.mark.parametrize("basis", ["rfft", "dct"])
def test_norm_cancels(basis):
    x = tokens(2, 12, 3)
    weight = tokens(3, 3, 3, 2) if basis == "rfft" else tokens(3, 4, 3)
    expected = spectral_filter(x, weight, grid=(3, 4), basis=basis)
    for norm in ("backward", "forward", None):
        assert_close(spectral_filter(x, weight, grid=(3, 4), basis=basis, norm=norm), expected)


def test_weight_of_one_is_the_identity():
    x = tokens(2, 35, 3)
    one = torch.tensor([1.0, 0.0]).expand(5, 4, 3, 2)
    assert_close(spectral_filter(x, one, grid=(5, 7)), x)
    assert_close(spectral_filter(x, torch.ones(35, 3), basis="dct"), x)
    assert_close(idct(dct(x) * 2), spectral_filter(x, 2 * torch.ones(35, 3), basis="dct"))


@pytest.mark.parametrize("prefix", [1, 5])
def test_prefix_tokens_are_copied_through(prefix):
    x, weight = tokens(2, prefix + 12, 3, dtype=torch.bfloat16), tokens(3, 3, 3, 2, dtype=torch.float32)
    y = spectral_filter(x, weight, grid=(3, 4), prefix_tokens=prefix)
    assert_identical(y[:, :prefix], x[:, :prefix])
    assert_identical(y[:, prefix:], spectral_filter(x[:, prefix:], weight, grid=(3, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_and_tokens_may_differ_in_dtype(dtype):
    x, weight = tokens(2, 12, 3, dtype=dtype), tokens(3, 3, 3, 2, dtype=torch.float32)
    x.requires_grad_()
    weight.requires_grad_()
    y = spectral_filter(x, weight, grid=(3, 4))
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert weight.grad.dtype == torch.float32
    assert_identical(y, spectral_filter(x.float(), weight, grid=(3, 4)).to(dtype))


@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (27, 32)])
def test_error_in_float32_is_at_most_twice_that_of_torch(grid):
    height, width = grid
    x, weight = tokens(2, height * width, 17), tokens(height, width // 2 + 1, 17, 2, seed=1)
    x, weight = x.float(), weight.float()
    truth = gradients(lambda x, w: global_filter(x, w, grid), [x.double(), weight.double()])
    baseline = gradients(lambda x, w: global_filter(x, w, grid), [x, weight])
    ours = gradients(lambda x, w: spectral_filter(x, w, grid=grid), [x, weight])
    truth.append(global_filter(x.double(), weight.double(), grid))
    baseline.append(global_filter(x, weight, grid))
    ours.append(spectral_filter(x, weight, grid=grid))
    for name, *results in zip(("dx", "dW", "y"), ours, baseline, truth, strict=True):
        assert_as_accurate(*results, name=name)
