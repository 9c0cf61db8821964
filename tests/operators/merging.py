"""Rows of the operators that merge tokens, and of those that merged tokens need."""

from __future__ import annotations

import torch
from torch import Tensor

import mlip_kernels as mk
from operators.case import INTEGER, LINEAR, Arguments, Operator, counts, first, random

MASK = first(13, 4, tokens=13)
"""Of the second element of the batch, most is padding, and some of it is dropped."""


def matching(dtype: torch.dtype) -> dict[str, Arguments]:
    metric, guide = random(2, 13, 6, dtype=dtype, seed=2), random(2, 13, dtype=dtype, seed=5)
    everything = {"size": counts(2, 13), "guide": guide, "guide_weight": 0.3, "prefix_tokens": 2, "mask": MASK}
    return {
        "guided and masked": {"metric": metric, "r": 4, **everything},
        "plain": {"metric": metric, "r": 4},
        "sizes": {"metric": metric, "r": 4, "size": counts(2, 13)},
        "capped": {"metric": metric, "r": 4, "max_merges": 1, "mask": MASK},
        "nothing to merge": {"metric": metric, "r": 0},
    }


def merging(dtype: torch.dtype) -> dict[str, Arguments]:
    x = random(2, 13, 9, dtype=dtype)
    return {name: {"x": x, **arguments} for name, arguments in matching(dtype).items()}


METRIC = random(2, 13, 6, seed=2)
PLAN = mk.merge_plan(METRIC, 4, size=counts(2, 13))
MASKED_PLAN = mk.merge_plan(METRIC, 4, mask=MASK)
COMPOSED_PLAN = MASKED_PLAN.then(mk.merge_plan(METRIC[:, 4:], 3, mask=MASKED_PLAN.mask))
PLANS = {"masked": MASKED_PLAN, "sizes": PLAN, "composed": COMPOSED_PLAN}


def merge_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    x, size = random(2, 13, 9, dtype=dtype), counts(2, 13, seed=4)
    return {name: {"self": plan, "x": x, "size": size} for name, plan in PLANS.items()} | {
        "no sizes": {"self": MASKED_PLAN, "x": x}
    }


def unmerge_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    return {name: {"self": plan, "y": random(2, plan.merged_tokens, 9, dtype=dtype)} for name, plan in PLANS.items()}


def split_plan() -> mk.MergePlan:
    return mk.merge_plan(random(5, 301, 16), 60, mask=first(301, 301, 120, 301, 7, tokens=301))


def mean_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    x = random(2, 13, 9, dtype=dtype)
    padded = counts(2, 13)
    padded[1, 5:] = 0
    return {
        "weights": {"x": x, "weight": random(2, 13, dtype=dtype, seed=3).abs(), "prefix_tokens": 1},
        "plain": {"x": x},
        "padding": {"x": x, "weight": padded.to(dtype)},
    }


def attention_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    qkv = {name: random(2, 3, 13, 8, dtype=dtype, seed=seed) for seed, name in enumerate("qkv", 4)}
    padded = counts(2, 13)
    padded[0, 2:4], padded[1] = 0, 0
    return {
        "sizes": {**qkv, "size": counts(2, 13)},
        "padding": {**qkv, "size": padded, "scale": 0.3},
        "fewer queries": {**qkv, "q": qkv["q"][:, :, :5], "size": counts(2, 13).long()},
        "no sizes": {**qkv, "size": None},
    }


def attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float | None = None) -> Tensor:
    """The formula, in the dtype of its inputs; a sample without a key gives zeros."""
    size = torch.ones_like(k[:, 0, :, 0]) if size is None else size
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + size.to(q.dtype).log()[:, None, None]
    empty = (size == 0).all(1)[:, None, None, None]
    return torch.where(empty, 0.0, scores.masked_fill(empty, 0).softmax(-1) @ v)


MERGING = [
    Operator(
        "merge_plan",
        mk.merge_plan,
        matching,
        lambda dtype: {"metric": random(5, 301, 40, dtype=dtype), "r": 60, "guide": random(5, 301, seed=1)},
        ("merging_match", "merging_match_capped"),
        derivatives=INTEGER,
    ),
    Operator(
        "merge_tokens",
        mk.merge_tokens,
        merging,
        lambda dtype: {"x": random(5, 301, 96, dtype=dtype), "metric": random(5, 301, 40, dtype=dtype), "r": 60},
        ("merging_match", "merging_match_capped", "merging_merge"),
        ("x",),
        LINEAR,
        nodes=2,
    ),
    Operator(
        "MergePlan.merge",
        mk.MergePlan.merge,
        merge_samples,
        lambda dtype: {"self": split_plan(), "x": random(5, 301, 96, dtype=dtype), "size": counts(5, 301)},
        ("merging_merge",),
        ("x",),
        LINEAR,
    ),
    Operator(
        "MergePlan.unmerge",
        mk.MergePlan.unmerge,
        unmerge_samples,
        lambda dtype: {"self": split_plan(), "y": random(5, 241, 96, dtype=dtype)},
        ("merging_spread",),
        ("y",),
        LINEAR,
    ),
    Operator(
        "weighted_mean",
        mk.weighted_mean,
        mean_samples,
        lambda dtype: {"x": random(3, 700, 130, dtype=dtype), "weight": random(3, 700, seed=1).abs()},
        ("merging_weighted_mean",),
        ("x", "weight"),
    ),
    Operator(
        "proportional_attention",
        mk.proportional_attention,
        attention_samples,
        lambda dtype: attention_samples(dtype)["sizes"],
        (),
        ("q", "k", "v"),
        nodes=0,
        definition=attention,
        rounded_by_autocast=("q", "k", "v"),
    ),
]
