"""Merging family: our operators, what one would write in PyTorch, the reference, and the bound by bandwidth."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

from mlip_kernels import weighted_mean
from mlip_kernels.reference.merging.weighted_mean import weighted_mean as reference

SHAPE = (64, 197, 384)  # a batch from ViT-S; with its gradient it stays below the size at which malloc maps fresh pages
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def plain(x, weight):
    """What one would write: no care for padding that holds NaN, nor for weights that sum to 0."""
    weight = weight[:, :, None]
    return ((x.float() * weight).sum(1) / weight.sum(1)).to(x.dtype)


def bound(x, writes):
    """What cannot be avoided: reading the bytes of ``x`` once, and with ``writes`` writing as many."""
    words = x.flatten().view(torch.float32)
    out = torch.empty_like(words)

    def run():
        words.sum()
        if writes:
            out.fill_(0.0)

    return run


def training(function, x, weight):
    """Forward and backward to the tokens."""
    x = x.clone().requires_grad_()
    grad = torch.randn(x.shape[0], x.shape[2], device=x.device).to(x.dtype)

    def run():
        torch.autograd.grad(function(x, weight), x, grad)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["forward", "forward + backward"])
def test_weighted_mean(benchmark, ratios, mode, dtype):
    benchmark.group = f"weighted_mean {list(SHAPE)} {dtype}, {mode}"
    x = torch.randn(SHAPE, device=DEVICE).to(DTYPES[dtype])
    weight = torch.randint(1, 4, SHAPE[:2], device=DEVICE).float()
    compiled = torch.compile(reference, fullgraph=True)
    functions = {
        "ours": weighted_mean,
        "plain PyTorch": plain,
        "eager reference": reference,
        "compiled reference": compiled,
    }
    if mode == "forward":
        runs = {name: lambda function=function: function(x, weight) for name, function in functions.items()}
    else:
        runs = {name: training(function, x, weight) for name, function in functions.items()}
    runs["bandwidth bound"] = bound(x, writes=mode != "forward")
    best = ratios(runs.pop("ours"), runs)
    traffic = x.numel() * x.element_size() * (1 if mode == "forward" else 2)
    benchmark.extra_info["GB/s"] = round(traffic / best["ours"] / 1e9, 2)
