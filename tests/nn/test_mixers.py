"""Spectral mixers compute what their definitions say in complex arithmetic."""

import pytest
import torch

from mlip_kernels.nn.spectral import ComplexMLP, FilterBank
from mlip_kernels.testing import assert_close, gradients

GRIDS = [(3, 4), (4, 5), (1, 7)]


def softshrink(x: torch.Tensor) -> torch.Tensor:
    return x.sign() * (x.abs() - ComplexMLP.THRESHOLD).clamp(min=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_complex_mlp_is_a_complex_linear_layer_over_channels(grid):
    torch.manual_seed(0)
    mixer = ComplexMLP(6, grid).double()
    torch.nn.init.normal_(mixer.bias_real)
    torch.nn.init.normal_(mixer.bias_imaginary)
    x = torch.randn(2, grid[0] * grid[1], 6, dtype=torch.float64)
    weight = torch.complex(mixer.weight_real.weight, mixer.weight_imaginary.weight)
    spectrum = torch.fft.rfft2(x.unflatten(1, grid), dim=(1, 2), norm="ortho")
    mixed = spectrum @ weight.T + torch.complex(mixer.bias_real, mixer.bias_imaginary)
    shrunk = torch.complex(softshrink(mixed.real.relu()), softshrink(mixed.imag.relu()))
    expected = torch.fft.irfft2(shrunk, s=grid, dim=(1, 2), norm="ortho").flatten(1, 2)
    # Computed in float64, compared to the precision of float32.
    assert_close(mixer(x).float(), expected.float())


@pytest.mark.parametrize("grid", GRIDS)
def test_the_filter_bank_mixes_its_filters_by_the_content_of_each_image(grid):
    torch.manual_seed(0)
    bank = FilterBank(6, grid, filters=3).double()
    x = torch.randn(2, grid[0] * grid[1], 6, dtype=torch.float64)
    for image in range(2):
        shares = bank.choice(x[image].mean(0)).softmax(0)
        mixed = sum(s * torch.view_as_complex(f.complex_weight) for s, f in zip(shares, bank.filters, strict=True))
        spectrum = torch.fft.rfft2(x[image].unflatten(0, grid), dim=(0, 1), norm="ortho") * mixed
        expected = torch.fft.irfft2(spectrum, s=grid, dim=(0, 1), norm="ortho").flatten(0, 1)
        assert_close(bank(x)[image].float(), expected.float())


@pytest.mark.parametrize("make", [lambda: ComplexMLP(4, (2, 3)), lambda: FilterBank(4, (2, 3), 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixers_keep_the_dtype_and_pass_gradients(make, dtype):
    mixer = make()
    x = torch.randn(2, 6, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert mixer(x).dtype == dtype
        (gradient,) = gradients(mixer, [x])
    assert gradient.dtype == dtype
    assert bool(gradient.isfinite().all())
    assert bool(gradient.any())
