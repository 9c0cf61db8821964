"""Spectral resizing of the patch grid."""

import pytest
import scipy.fft
import torch

from mlip_kernels.spectral import spectral_resize
from mlip_kernels.testing import assert_close, assert_identical

SIZES = [
    ((4, 4), (2, 2)),
    ((24, 24), (12, 12)),
    ((7, 8), (14, 5)),
    ((5, 3), (5, 3)),
    ((1, 6), (3, 1)),
    ((2, 3), (9, 7)),
]


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(("grid", "new_grid"), SIZES)
def test_equals_cropped_or_padded_dct(grid, new_grid, rescale):
    (height, width), (new_height, new_width) = grid, new_grid
    x = tokens(2, height * width, 3)
    spectrum = torch.from_numpy(scipy.fft.dctn(x.numpy().reshape(2, *grid, 3), axes=(1, 2), norm="ortho"))
    kept = torch.zeros(2, *new_grid, 3, dtype=torch.float64)
    h, w = min(height, new_height), min(width, new_width)
    kept[:, :h, :w] = spectrum[:, :h, :w]
    expected = torch.from_numpy(scipy.fft.idctn(kept.numpy(), axes=(1, 2), norm="ortho")).reshape(2, -1, 3)
    if rescale:
        expected = expected * (new_height * new_width / (height * width)) ** 0.5
    assert_close(spectral_resize(x, grid, new_grid, rescale=rescale), expected)


@pytest.mark.parametrize(("grid", "new_grid"), SIZES)
def test_is_one_matrix_per_axis(grid, new_grid):
    def matrix(n, new_n):
        return spectral_resize(torch.eye(n, dtype=torch.float64)[None], (n, 1), (new_n, 1))[0]

    x = tokens(1, grid[0] * grid[1], 1)
    matrix_h, matrix_w = (matrix(n, new_n) for n, new_n in zip(grid, new_grid, strict=True))
    expected = matrix_h @ x.reshape(grid) @ matrix_w.T
    assert_close(spectral_resize(x, grid, new_grid).reshape(new_grid), expected)


@pytest.mark.parametrize(("grid", "new_grid"), SIZES)
def test_constants_stay_constant(grid, new_grid):
    x = torch.full((2, grid[0] * grid[1], 3), 2.5)
    assert_close(spectral_resize(x, grid, new_grid), torch.full((2, new_grid[0] * new_grid[1], 3), 2.5))


def test_there_and_back_is_the_identity_when_growing():
    x = tokens(2, 12, 3)
    for rescale in (True, False):
        larger = spectral_resize(x, (3, 4), (7, 9), rescale=rescale)
        assert_close(spectral_resize(larger, (7, 9), (3, 4), rescale=rescale), x)
    assert_close(larger.square().sum(), x.square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_prefix_tokens_are_copied_through(prefix, dtype):
    x = tokens(2, prefix + 12, 3, dtype=dtype)
    y = spectral_resize(x, (3, 4), [2, 5], prefix_tokens=prefix)
    assert y.dtype == dtype
    assert_identical(y[:, :prefix], x[:, :prefix])
    assert_identical(y[:, prefix:], spectral_resize(x[:, prefix:].float(), (3, 4), (2, 5)).to(dtype))
