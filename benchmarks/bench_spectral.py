"""Spectral family: our operators, plain PyTorch, the peers, the reference, and one copy of the tokens as the bound.

Each runs under two allocators (see `conftest.allocator`): glibc as it is maps fresh pages for every large result, and
those page faults can cost more than the transform.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from conftest import DEVICE

from mlip_kernels import band_energy, dct, rfft, spectral_filter, use_reference

BATCH, CHANNELS = 64, 768
GRIDS = {"7x7": (7, 7), "14x14": (14, 14), "16x16": (16, 16), "24x24": (24, 24)}
AXES = {"197": 197, "256": 256, "257": 257}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("forward", "forward + backward")
HAS_TORCH_DCT = importlib.util.find_spec("torch_dct") is not None


@pytest.fixture(autouse=True)
def compiled_afresh():
    """Every case compiles functions of its own; their number would run into the limit of recompilations."""
    torch.compiler.reset()


def tokens(n, dtype=torch.float32):
    return torch.randn(BATCH, n, CHANNELS, device=DEVICE).to(dtype)


def reference(operator):
    """The operator on plain PyTorch."""

    def run(x):
        with use_reference():
            return operator(x)

    return run


def training(function, x):
    """Forward and backward to the tokens."""
    x = x.clone().requires_grad_()
    with torch.no_grad():
        grad = torch.randn_like(function(x.detach()), dtype=torch.float32).to(x.dtype)

    def run():
        torch.autograd.grad(function(x), x, grad)

    return run


def compare(ratios, functions, x, mode, copies):
    """Take turns with everything in ``functions``; ``copies`` copies of the tokens are the bound."""
    runs = {
        name: training(function, x) if mode != "forward" else lambda function=function: function(x)
        for name, function in functions.items()
    }
    runs["copies"] = lambda: [x.clone() for _ in range(copies)]
    return ratios(runs.pop("ours"), runs, rounds=5)


def torch_dct_2d(height, width):
    import torch_dct

    def run(x):
        plane = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)
        return torch_dct.dct_2d(plane, norm="ortho").flatten(2).transpose(1, 2).contiguous()

    return run


def scipy_dctn(height, width):
    import scipy.fft

    def run(x):
        plane = x.reshape(x.shape[0], height, width, x.shape[2]).numpy()
        return torch.from_numpy(scipy.fft.dctn(plane, axes=(1, 2), norm="ortho")).flatten(1, 2)

    return run


def global_filter(height, width, weight):
    """GFNet's layer as it is written."""

    def run(x):
        spectrum = torch.fft.rfft2(x.float().view(x.shape[0], height, width, -1), dim=(1, 2), norm="ortho")
        spectrum = spectrum * torch.view_as_complex(weight)
        back = torch.fft.irfft2(spectrum, s=(height, width), dim=(1, 2), norm="ortho")
        return back.reshape(x.shape).to(x.dtype)

    return run


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", GRIDS)
def test_dct_of_a_grid(benchmark, ratios, allocator, grid, mode):
    benchmark.group = f"dct {grid} float32, {mode}, {allocator} allocator"
    height, width = GRIDS[grid]
    x = tokens(height * width)

    def ours(x):
        return dct(x, grid=(height, width))

    functions = {
        "ours": ours,
        "two matmuls": reference(ours),
        "compiled reference": torch.compile(reference(ours), fullgraph=True, dynamic=False),
    }
    if HAS_TORCH_DCT:
        functions["torch-dct"] = torch_dct_2d(height, width)
    if mode == "forward" and DEVICE.type == "cpu":
        functions["scipy"] = scipy_dctn(height, width)
    compare(ratios, functions, x, mode, copies=1 if mode == "forward" else 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", GRIDS)
def test_spectral_filter(benchmark, ratios, allocator, grid, mode):
    benchmark.group = f"spectral_filter {grid} float32, {mode}, {allocator} allocator"
    height, width = GRIDS[grid]
    x = tokens(height * width)
    weight = torch.randn(height, width // 2 + 1, CHANNELS, 2, device=DEVICE, requires_grad=mode != "forward")

    def ours(x):
        return spectral_filter(x, weight, grid=(height, width))

    functions = {
        "ours": ours,
        "torch.fft": global_filter(height, width, weight),
        "eager reference": reference(ours),
        "compiled reference": torch.compile(reference(ours), fullgraph=True, dynamic=False),
    }
    compare(ratios, functions, x, mode, copies=1 if mode == "forward" else 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", AXES)
def test_dct_of_the_token_axis(benchmark, ratios, n, mode):
    benchmark.group = f"dct of {n} tokens float32, {mode}"

    def with_fft(x):  # as much work as a DCT by FFT does at least
        return torch.fft.rfft(x, dim=1, norm="ortho").real

    functions = {"ours": dct, "dense matmul": reference(dct), "torch.fft.rfft": with_fft}
    compare(ratios, functions, tokens(AXES[n]), mode, copies=1 if mode == "forward" else 2)


@pytest.mark.parametrize("operator", ["dct", "rfft", "spectral_filter"])
def test_given_output(benchmark, ratios, allocator, operator):
    """How many times as long it takes to allocate the result as to write it into memory that is there."""
    benchmark.group = f"{operator} 14x14 float32 with out=, {allocator} allocator"
    x, weight = tokens(196), torch.randn(14, 8, CHANNELS, 2, device=DEVICE)
    run = {
        "dct": lambda **given: dct(x, grid=(14, 14), **given),
        "rfft": lambda **given: rfft(x, grid=(14, 14), **given),
        "spectral_filter": lambda **given: spectral_filter(x, weight, grid=(14, 14), **given),
    }[operator]
    out = run()
    ratios(lambda: run(out=out), {"without out": run})


@pytest.mark.parametrize("operator", ["dct", "band_energy", "spectral_filter"])
def test_bfloat16(benchmark, ratios, operator):
    """How many times as long float32 takes: 2 is what the bytes say."""
    benchmark.group = f"{operator} 14x14, bfloat16 and float32"
    grid = (14, 14)
    weight = torch.randn(14, 8, CHANNELS, 2, device=DEVICE)
    run = {
        "dct": lambda x: dct(x, grid=grid),
        "band_energy": lambda x: band_energy(x, 4, grid=grid),
        "spectral_filter": lambda x: spectral_filter(x, weight, grid=grid),
    }[operator]
    single, half = tokens(196), tokens(196, torch.bfloat16)
    ratios(lambda: run(half), {"float32": lambda: run(single), "bfloat16 reference": lambda: reference(run)(half)})


@pytest.mark.parametrize("mode", MODES)
def test_band_energy(benchmark, ratios, mode):
    benchmark.group = f"band_energy 14x14 float32, {mode}"

    def ours(x):
        return band_energy(x, 4, grid=(14, 14))

    functions = {
        "ours": ours,
        "eager reference": reference(ours),
        "compiled reference": torch.compile(reference(ours), fullgraph=True, dynamic=False),
    }
    compare(ratios, functions, tokens(196), mode, copies=1 if mode == "forward" else 2)
