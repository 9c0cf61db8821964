"""Cosine transforms on emulated CUDA against SciPy in float64: sizes, types, norms, channels and prefixes in turn."""

import pytest
import torch

import mlip_kernels
from mlip_kernels import use_reference
from mlip_kernels.testing import assert_as_accurate, assert_close

fft = pytest.importorskip("scipy.fft", reason="needs SciPy")

SIZES = (1, 2, 3, 7, 8, 13, 14, 16, 24, 27, 32, 49, 50, 77, 196, 197, 256, 257, 576, 577)
NORMS = ("ortho", "backward", "forward")
CASES = [
    pytest.param(
        n,
        2 + i % 3 if n == 1 else 1 + i % 4,
        NORMS[i % 3],
        (1, 3, 17, 65)[i % 4 if n < 100 else i % 2],
        (0, 1, 5)[i // 3 % 3],
    )
    for i, n in enumerate(SIZES)
]


def tokens(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(cuda, operator, x, truth):
    """``operator`` of x on the kernels, as accurate as plain PyTorch is; the prefix bit for bit."""
    with cuda:
        found = operator(cuda.put(x)).cpu()
    assert cuda.operators == ["spectral_separable"]
    with use_reference():
        assert_close(operator(x.double()), truth, roundings=64)  # else a wrong baseline would excuse a wrong result
        assert_as_accurate(found, operator(x), truth)


@pytest.fixture
def cuda(needs_emulated):
    needs_emulated("cuda")
    from emulated_cuda import EmulatedCuda

    return EmulatedCuda("cuda", 80)


@pytest.mark.parametrize("name", ["dct", "idct"])
@pytest.mark.parametrize(("size", "kind", "norm", "channels", "prefix"), CASES)
def test_token_axis(cuda, size, kind, norm, channels, prefix, name):
    x = tokens(2, prefix + size, channels)
    transformed = getattr(fft, name)(x[:, prefix:].double().numpy(), type=kind, norm=norm, axis=1)
    truth = torch.cat((x[:, :prefix].double(), torch.from_numpy(transformed)), 1)
    check(cuda, lambda x: getattr(mlip_kernels, name)(x, type=kind, norm=norm, prefix_tokens=prefix), x, truth)


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
@pytest.mark.parametrize(("norm", "grid"), list(zip(NORMS, [(7, 7), (5, 8), (14, 14)], strict=True)), ids=str)
def test_grids(cuda, grid, norm, kind):
    x = tokens(2, 1 + grid[0] * grid[1], 17)
    plane = x[:, 1:].double().reshape(2, *grid, 17).numpy()
    transformed = torch.from_numpy(fft.dctn(plane, type=kind, norm=norm, axes=(1, 2))).flatten(1, 2)
    truth = torch.cat((x[:, :1].double(), transformed), 1)
    check(cuda, lambda x: mlip_kernels.dct(x, type=kind, grid=grid, norm=norm, prefix_tokens=1), x, truth)
