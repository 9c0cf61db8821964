"""Merging family: our operators, what one would write in PyTorch, the reference, and the bound by the machine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE

from mlip_kernels import merge_plan, merge_tokens, merging, proportional_attention, use_reference, weighted_mean
from mlip_kernels.merging.plain import weighted_mean as reference

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


MERGES = {"197 - 16": (64, 197, 768, 16), "50 - 8": (64, 50, 768, 8)}


def tome(x, metric, r):
    """What one would write: the published algorithm on torch's own functions, a class token in front."""
    unit = F.normalize(metric.detach(), dim=-1)
    scores = unit[:, 2::2] @ unit[:, 1::2].transpose(1, 2)
    highest, best = scores.max(dim=-1)
    order = highest.argsort(dim=1, descending=True)
    merged, kept = order[:, :r], order[:, r:].sort(dim=1)[0]
    channels = x.shape[2]

    def pick(tokens, rows):
        return tokens.gather(1, rows[..., None].expand(-1, -1, tokens.shape[2]))

    sources, targets = x[:, 2::2], x[:, 1::2]
    into = best.gather(1, merged)[..., None]
    total = targets.scatter_add(1, into.expand(-1, -1, channels), pick(sources, merged))
    counts = x.new_ones(targets.shape[:2], dtype=torch.float32)
    counts = counts.scatter_add(1, into[..., 0], torch.ones_like(into[..., 0], dtype=torch.float32))
    return torch.cat((x[:, :1], pick(sources, kept), (total / counts[..., None]).to(x.dtype)), dim=1)


def merge_reference(x, metric, r):
    with torch.no_grad():
        matching = merging.match(metric, r)
    return merging.merge(x, torch.ones(x.shape[:2], device=x.device), matching)[0]


def merge_bound(x, r, width, backward):
    """What cannot be avoided: x and the metric read, the result written, one product of sources and targets.

    The products are one matrix product with as many flops, which the library runs at its best. Backward reads and
    writes gradients, which are tensors of their own: it does not find in the caches what forward left there.
    """
    batch, tokens, _ = x.shape
    words = x.flatten()
    out, grad = (torch.zeros_like(x[:, r:]).flatten() for _ in range(2))
    grad_x = torch.empty_like(words)
    rows = batch * (tokens // 2)
    metric, targets = torch.randn(rows, width, device=x.device), torch.randn(width, tokens // 2, device=x.device)
    product = torch.empty(rows, tokens // 2, device=x.device)

    def run():
        torch.mm(metric, targets, out=product)
        out.copy_(words[: out.numel()])
        if backward:
            grad_x[: grad.numel()].copy_(grad)
            grad_x[grad.numel() :].copy_(grad[: grad_x.numel() - grad.numel()])

    return run


@pytest.mark.parametrize("width", [64, 768])
@pytest.mark.parametrize("mode", ["forward", "forward + backward"])
@pytest.mark.parametrize("case", MERGES)
def test_merge_tokens(benchmark, ratios, allocator, case, mode, width):
    batch, tokens, channels, r = MERGES[case]
    benchmark.group = f"merge_tokens {[batch, tokens, channels]} r={r} metric {width}, {mode}, {allocator} malloc"
    x = torch.randn(batch, tokens, channels, device=DEVICE)
    metric = torch.randn(batch, tokens, width, device=DEVICE)
    torch._dynamo.reset()
    functions = {
        "ours": lambda x, metric, r: merge_tokens(x, metric, r)[0],
        "plain PyTorch": tome,
        "compiled plain PyTorch": torch.compile(tome, fullgraph=True),
        "eager reference": merge_reference,
        "compiled reference": torch.compile(merge_reference, fullgraph=True),
    }
    if mode == "forward":
        runs = {name: lambda function=function: function(x, metric, r) for name, function in functions.items()}
    else:
        leaf = x.clone().requires_grad_()
        grad = torch.randn(batch, tokens - r, channels, device=DEVICE).to(x.dtype)

        def train(function):
            torch.autograd.grad(function(leaf, metric, r), leaf, grad)

        runs = {name: lambda function=function: train(function) for name, function in functions.items()}
    runs["bound"] = merge_bound(x, r, width, mode != "forward")
    ratios(runs.pop("ours"), runs, rounds=7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 768])
@pytest.mark.parametrize("case", MERGES)
def test_merge_plan(benchmark, ratios, case, width, dtype):
    """Only the choice of the pairs; the reference sums in float64 and holds the matrix of similarities."""
    batch, tokens, _, r = MERGES[case]
    benchmark.group = f"merge_plan {[batch, tokens, width]} r={r} {dtype}"
    metric = torch.randn(batch, tokens, width, device=DEVICE).to(DTYPES[dtype])

    def plain():
        unit = F.normalize(metric, dim=-1)
        highest, best = (unit[:, 2::2] @ unit[:, 1::2].transpose(1, 2)).max(dim=-1)
        return highest.argsort(dim=1, descending=True), best

    def with_reference():
        with use_reference():
            return merge_plan(metric, r)

    others = {"plain PyTorch": plain, "eager reference": with_reference}
    ratios(lambda: merge_plan(metric, r), others, rounds=7)


HEADS = (16, 6, 197, 64)  # ViT-S


def written_out(q, k, v, size):
    """Attention as ToMe writes it: the matrix of scores is formed, and kept for the backward pass."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores + size.log()[:, None, None]).softmax(-1).to(v.dtype) @ v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["forward", "forward + backward"])
def test_proportional_attention(benchmark, ratios, mode, dtype):
    """Against attention that is not fused, and against fused attention that does not know sizes: the bound."""
    benchmark.group = f"proportional_attention {list(HEADS)} {dtype}, {mode}"
    batch, heads, tokens, width = HEADS
    qkv = torch.randn(batch, tokens, 3, heads, width, device=DEVICE).to(DTYPES[dtype])
    size = torch.randint(1, 5, (batch, tokens), device=DEVICE).float()
    functions = {
        "ours": proportional_attention,
        "written out": written_out,
        "fused attention without sizes": lambda q, k, v, size: F.scaled_dot_product_attention(q, k, v),
    }
    leaf = qkv.requires_grad_(mode != "forward")
    grad = torch.randn(batch, heads, tokens, width, device=DEVICE).to(DTYPES[dtype])

    def attend(function):
        attended = function(*leaf.permute(2, 0, 3, 1, 4), size)
        if leaf.requires_grad:
            torch.autograd.grad(attended, leaf, grad)

    runs = {name: lambda function=function: attend(function) for name, function in functions.items()}
    ratios(runs.pop("ours"), runs, rounds=10)
