"""Rows of the contrastive operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import mlip_kernels as mk
from operators.case import Arguments, Operator, counts, first, random
from operators.merging import MASK


def logits_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    sides = {"image_tokens": random(2, 13, 9, dtype=dtype), "text_tokens": random(3, 5, 9, dtype=dtype, seed=1)}
    masks = {"image_mask": MASK, "text_mask": first(5, 2, 0, tokens=5)}
    weights = {"image_weight": counts(2, 13).to(dtype), "text_weight": random(3, 5, dtype=dtype, seed=8).abs()}
    learned = {"scale": torch.tensor(2.0).to(dtype), "bias": torch.tensor(-1.0).to(dtype)}
    return {
        "everything": {**sides, **masks, **weights, **learned},
        "plain": sides,
        "masks": {**sides, **masks, "scale": 3.0, "bias": 0.5},
        "weights": {**sides, **weights},
    }


def loss_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    square, wide = random(7, 7, dtype=dtype), random(3, 5, dtype=dtype)
    labels = torch.tensor([3, 0, 1])
    return {
        "both": {"logits": square},
        "smoothing": {"logits": square, "label_smoothing": 0.1, "reduction": "sum"},
        "rows": {"logits": wide, "labels": labels, "directions": "rows"},
        "labels": {"logits": square, "labels": torch.tensor([3, 0, 0, 6, 2, 6, 1]), "label_smoothing": 1.0},
    }


def mean_cross_entropy(
    logits: Tensor, labels: Tensor | None = None, directions: str = "both", **options: Any
) -> Tensor:
    labels = torch.arange(len(logits)) if labels is None else labels
    loss = cross_entropy(logits, labels, **options)
    return loss if directions == "rows" else (loss + cross_entropy(logits.mT, labels, **options)) / 2


def most_similar(arguments: Arguments) -> float:
    """Similarities of either sign cancel in means, and in the gradients of weights."""
    sides = (arguments[name].double().norm(dim=-1).max() for name in ("image_tokens", "text_tokens"))
    return float(math.prod(sides)) * float(arguments.get("scale", 1.0))


CONTRASTIVE = [
    Operator(
        "token_logits",
        mk.token_logits,
        logits_samples,
        lambda dtype: {
            "image_tokens": random(24, 49, 64, dtype=dtype, seed=2),
            "text_tokens": random(20, 17, 64, dtype=dtype, seed=3),
        },
        ("token_logits", "contrastive_token_maxima"),
        ("image_tokens", "text_tokens", "image_weight", "text_weight", "scale", "bias"),
        largest=most_similar,
        shared=("scale", "bias"),
        per_sample=False,
    ),
    Operator(
        "pair_cross_entropy",
        mk.pair_cross_entropy,
        loss_samples,
        lambda dtype: {"logits": 4 * random(300, 300, dtype=dtype, seed=6)},
        ("pair_cross_entropy", "contrastive_pair_cross_entropy"),
        ("logits",),
        definition=mean_cross_entropy,
        largest=lambda arguments: float(arguments["logits"].abs().max()),
        shared=("logits", "labels"),
        per_sample=False,
    ),
]
