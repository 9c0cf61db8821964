"""Every public operator with small arguments, and the calls of registered operators that they end in.

What all operators promise is tested over these two tables, so that a new operator cannot be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mlip_kernels as mk


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TOKENS, TEXTS, METRIC = random(2, 13, 6), random(3, 5, 6, seed=1), random(2, 13, 4, seed=2)
SIZE = random(2, 13, seed=3).abs().mul(3).ceil()
MASK = torch.arange(13) < torch.tensor([[13], [4]])  # of the second, most is dropped
TEXT_MASK = torch.arange(5) < torch.tensor([[5], [2], [0]])
PLAN = mk.merge_plan(METRIC, 4, size=SIZE)
MASKED_PLAN = mk.merge_plan(METRIC, 4, mask=MASK)
HEADS = [random(2, 3, 13, 8, seed=seed) for seed in (4, 5, 6)]


@dataclass(frozen=True)
class Case:
    """``call`` takes ``inputs``, those in which it can be differentiated, and returns tensors."""

    call: Callable[..., Tensor | Sequence[Tensor]]
    inputs: tuple[Tensor, ...]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        results = self.call(*(inputs or self.inputs))
        return (results,) if isinstance(results, Tensor) else tuple(results)


def _maps(plan: mk.MergePlan) -> tuple[Tensor, ...]:
    maps = (plan.assignment, plan.kept, plan.removed, plan.mask, plan.dropped)
    return tuple(tensor for tensor in maps if tensor is not None)


CASES = {
    "dct": Case(lambda x: mk.dct(x, grid=(3, 4), prefix_tokens=1), (TOKENS,)),
    "idct": Case(lambda x: mk.idct(x, type=4, norm="forward", prefix_tokens=1), (TOKENS,)),
    "rfft": Case(lambda x: mk.rfft(x, grid=(3, 4), prefix_tokens=1), (TOKENS,)),
    "irfft": Case(lambda re, im: mk.irfft(re, im, n=13), (TOKENS[:, :7], TOKENS[:, 6:])),
    "spectral_filter": Case(
        lambda x, w: mk.spectral_filter(x, w, grid=(3, 4), prefix_tokens=1), (TOKENS, random(3, 3, 6, 2, seed=7))
    ),
    "spectral_filter dct": Case(
        lambda x, w: mk.spectral_filter(x, w, basis="dct", prefix_tokens=1), (TOKENS, random(12, 6, seed=7))
    ),
    "spectral_resize": Case(lambda x: mk.spectral_resize(x, (3, 4), (2, 5), prefix_tokens=1), (TOKENS,)),
    "band_energy": Case(lambda x: mk.band_energy(x, 3, grid=(3, 4), prefix_tokens=1), (TOKENS,)),
    "token_energy": Case(lambda x: mk.token_energy(x, 0.4, basis="rfft", prefix_tokens=1), (TOKENS,)),
    "amplitude_phase": Case(lambda x: mk.amplitude_phase(x, grid=(3, 4), prefix_tokens=1), (TOKENS,)),
    "weighted_mean": Case(lambda x, w: mk.weighted_mean(x, w, prefix_tokens=1), (TOKENS, SIZE)),
    "weighted_mean plain": Case(mk.weighted_mean, (TOKENS,)),
    "merge_plan": Case(lambda metric: _maps(mk.merge_plan(metric, 4, mask=MASK)), (METRIC,)),
    "merge_plan capped": Case(lambda metric: _maps(mk.merge_plan(metric, 4, max_merges=1)), (METRIC,)),
    "merge_tokens": Case(lambda x: mk.merge_tokens(x, METRIC, 4, size=SIZE)[:2], (TOKENS,)),
    "merge_tokens by themselves": Case(lambda x: mk.merge_tokens(x, x, 4)[:2], (TOKENS,)),
    "merge_tokens masked": Case(lambda x: mk.merge_tokens(x, METRIC, 4, mask=MASK)[:2], (TOKENS,)),
    "MergePlan merge": Case(lambda x: MASKED_PLAN.merge(x)[0], (TOKENS,)),
    "MergePlan unmerge": Case(lambda y: MASKED_PLAN.unmerge(y), (TOKENS[:, :9],)),
    "proportional_attention": Case(lambda q, k, v: mk.proportional_attention(q, k, v, SIZE), tuple(HEADS)),
    "pair_cross_entropy": Case(lambda x: mk.pair_cross_entropy(x, label_smoothing=0.1), (random(7, 7),)),
    "pair_cross_entropy rows": Case(
        lambda x: mk.pair_cross_entropy(x, torch.tensor([3, 0, 1]), directions="rows"), (random(3, 5),)
    ),
    "token_logits": Case(
        lambda v, t, w, u: mk.token_logits(v, t, image_weight=w, text_weight=u, scale=2.0),
        (TOKENS, TEXTS, SIZE, random(3, 5, seed=8).abs()),
    ),
    "token_logits masked": Case(
        lambda v, t: mk.token_logits(v, t, image_mask=MASK, text_mask=TEXT_MASK), (TOKENS, TEXTS)
    ),
}


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "mlip_kernels" and not kwargs:
            arguments = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
            self.found.append((function, arguments))
        return function(*args, **(kwargs or {}))


def recorded_calls() -> list[tuple[Any, tuple[Any, ...]]]:
    """Calls of registered operators, with their arguments, in the forward and backward passes of all `CASES`."""
    with _Calls() as calls:
        for case in CASES.values():
            leaves = [x.clone().requires_grad_() for x in case.inputs]
            results = [y for y in case(*leaves) if y.requires_grad]
            if results:
                torch.autograd.grad([y.sum() for y in results], leaves, allow_unused=True)
        dense = TOKENS.float()
        mk.dct(dense, out=torch.empty(2, 13, 6))
        mk.spectral_filter(dense, dense[0], basis="dct", out=torch.empty(2, 13, 6))
        real, imaginary = mk.rfft(dense, out=(torch.empty(2, 7, 6), torch.empty(2, 7, 6)))
        mk.irfft(real, imaginary, n=13, out=torch.empty(2, 13, 6))
    return calls.found


def attempt(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What ``call`` returns, or the error that it raises instead."""
    try:
        return call(), None
    except (NotImplementedError, RuntimeError) as error:
        return None, error


def names_of(calls: Sequence[tuple[Any, tuple[Any, ...]]]) -> list[str]:
    """An identifier for each of ``calls``."""
    return [f"{number}-{operator._schema.name.partition('::')[2]}" for number, (operator, _) in enumerate(calls)]
