"""Operators at the sizes of a vision transformer: what is timed, and the bytes that have to move."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import mlip_kernels as mk


class Workload(NamedTuple):
    """One operator with arguments."""

    name: str
    operator: str
    """The operator whose backend its time speaks for."""
    function: Callable[..., object]
    inputs: tuple[Tensor, ...]
    """Those that get gradients come first."""
    differentiated: int
    """How many of them do."""
    bytes: int
    """That a forward pass has to read and write."""


def workloads(device: torch.device, dtype: torch.dtype) -> list[Workload]:
    """All that is timed; small where the device is no GPU."""
    small = device.type != "cuda"
    batch, width, pairs, logits = (2, 32, 4, 64) if small else (256, 768, 512, 4096)
    grid = {"grid": (14, 14), "prefix_tokens": 1}

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, weight = random(batch, 197, width), torch.randn(14, 8, width, 2, device=device)
    moved, size_of = 2 * x.nbytes, torch.rand(batch, 197, device=device) + 1
    plan = mk.merge_plan(x, 13)
    merged = plan.merge(x)[0]
    images = torch.nn.functional.normalize(random(pairs, 49, 256), dim=-1)
    texts = torch.nn.functional.normalize(random(pairs, 77, 256), dim=-1)
    matrix, labels = random(logits, logits), torch.arange(logits, device=device)
    heads = [random(batch, width // 32, 197, 32) for _ in range(3)]
    tokens = random(batch, 197, width)
    both = images.nbytes + texts.nbytes + 2 * pairs**2 * 4
    spectrum = 2 * batch * 14 * 8 * width * x.element_size()

    def filtered(tokens: Tensor, filters: Tensor) -> Tensor:
        return mk.spectral_filter(tokens, filters, **grid)

    def cross_entropy(matrix: Tensor) -> Tensor:
        return mk.pair_cross_entropy(matrix, labels)

    return [
        Workload("dct, 14 x 14", "dct", lambda a: mk.dct(a, **grid), (x,), 1, moved),
        Workload("dct, 197 tokens", "dct", mk.dct, (x,), 1, moved),
        Workload("rfft, 14 x 14", "rfft", lambda a: mk.rfft(a, **grid), (x,), 1, x.nbytes + spectrum),
        Workload("spectral_filter", "spectral_filter", filtered, (x, weight), 2, moved),
        Workload("token_energy", "token_energy", lambda a: mk.token_energy(a, 0.5, **grid), (x,), 1, x.nbytes),
        Workload("band_energy", "band_energy", lambda a: mk.band_energy(a, 8, **grid), (x,), 1, x.nbytes),
        Workload("weighted_mean", "weighted_mean", lambda a: mk.weighted_mean(a, size_of), (x,), 1, x.nbytes),
        Workload("merge_plan, r=13", "merge_plan", lambda a: mk.merge_plan(a, 13).maps, (tokens,), 0, tokens.nbytes),
        Workload("merge, r=13", "merge_tokens", lambda a: plan.merge(a)[0], (x,), 1, x.nbytes + merged.nbytes),
        Workload("unmerge, r=13", "merge_tokens", plan.unmerge, (merged,), 1, x.nbytes + merged.nbytes),
        Workload("token_logits, 49 x 77", "token_logits", mk.token_logits, (images, texts), 2, both),
        Workload("pair_cross_entropy", "pair_cross_entropy", cross_entropy, (matrix,), 1, matrix.nbytes),
        Workload(
            "proportional_attention",
            "proportional_attention",
            lambda q, k, v: mk.proportional_attention(q, k, v, size_of),
            tuple(heads),
            3,
            4 * heads[0].nbytes,
        ),
    ]


def forward(workload: Workload) -> Callable[[], object]:
    """The call alone, without gradients."""
    return torch.no_grad()(lambda: workload.function(*workload.inputs))


def trained(workload: Workload, function: Callable[..., object] | None = None) -> Callable[[], object] | None:
    """The call and its gradients; None where it has none."""
    if not workload.differentiated:
        return None
    call = function or workload.function
    leaves = [x.detach().requires_grad_() for x in workload.inputs[: workload.differentiated]]

    def step() -> object:
        results = call(*leaves, *workload.inputs[workload.differentiated :])
        outputs = [y for y in (results if isinstance(results, tuple) else (results,)) if y.requires_grad]
        return torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])

    return step
