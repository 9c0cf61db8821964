"""Zero-shot retrieval on held-out pairs: the caption of an image among all captions, and the reverse."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mlip_kernels.data import Batch
from mlip_kernels.models import MLIP

RANKS = (1, 5, 10)
NAMES = tuple(f"{direction}@{k}" for direction in ("image_to_text", "text_to_image") for k in RANKS)
"""Of the figures of an evaluation."""


class Retrieval(NamedTuple):
    """Outcome of one evaluation."""

    recall: dict[str, float]
    """``image_to_text@k`` and ``text_to_image@k`` in [0, 1]."""
    similarity: Tensor
    """``[P, P]`` cosine of image i and caption j."""


def recall(similarity: Tensor) -> dict[str, float]:
    """Share of images whose own caption is among the k most similar ones, and the reverse.

    A tie with a wrong candidate counts against the right one, so that equal features score nothing.

    Args:
        similarity: ``[P, P]``, pair i on the diagonal.
    """
    own = similarity.diagonal()
    better_captions = (similarity >= own[:, None]).sum(1) - 1
    better_images = (similarity >= own[None, :]).sum(0) - 1
    return {
        f"{direction}@{k}": float((better < k).double().mean())
        for direction, better in (("image_to_text", better_captions), ("text_to_image", better_images))
        for k in RANKS
    }


@torch.no_grad()
def evaluate(model: MLIP, batches: Iterable[Batch], device: torch.device, autocast: torch.autocast) -> Retrieval:
    """Encode held-out pairs with ``model`` in evaluation mode and rank them against each other.

    Raises:
        ValueError: if there is no pair to evaluate on.
    """
    training = model.training
    model.eval()
    images, texts = [], []
    for batch in batches:
        with autocast:
            images.append(model.encode_image(batch.images.to(device), normalize=True).float())
            texts.append(model.encode_text(batch.text.to(device), normalize=True).float())
    model.train(training)
    if not images:
        raise ValueError("held_out: expected at least one pair to evaluate on, got none")
    similarity = torch.cat(images) @ torch.cat(texts).T
    return Retrieval(recall(similarity), similarity.cpu())
