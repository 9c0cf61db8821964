"""Which tokens are informative: the guides that tell token merging what to keep apart.

A guide is one number per token, higher for what should merge last. It selects and is never differentiated. Guides of
different origin are made comparable by their rank within the image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def class_attention(query: Tensor, keys: Tensor, size: Tensor | None = None) -> Tensor:
    """Attention that the class token pays to every token, averaged over the heads.

    One row of the attention matrix, so the other N − 1 are never formed (EViT, arXiv 2202.07800, takes the same row).

    Args:
        query: ``[B, heads, head_dim]``, the query of the class token.
        keys: ``[B, heads, N, head_dim]``.
        size: ``[B, N]`` patches that each token stands for, or ``None`` for ones.

    Returns:
        ``[B, N]`` float32; each row sums to 1.
    """
    logits = torch.einsum("bhd,bhnd->bhn", query, keys).float() / math.sqrt(query.shape[-1])
    if size is not None:
        logits = logits + size.log()[:, None]
    return logits.softmax(-1).mean(1)


@torch.no_grad()
def similarity_to_pooled(tokens: Tensor, pooled: Tensor) -> Tensor:
    """Cosine of every token ``[B, N, D]`` with one pooled token ``[B, D]``, float32 ``[B, N]``."""
    tokens, pooled = F.normalize(tokens.float(), dim=-1), F.normalize(pooled.float(), dim=-1)
    with torch.autocast(tokens.device.type, enabled=False):
        return torch.einsum("bnd,bd->bn", tokens, pooled)


@torch.no_grad()
def rank(guide: Tensor) -> Tensor:
    """Rank of every token within its row, scaled to [0, 1]; equal values rank by index.

    Args:
        guide: ``[B, N]``.

    Returns:
        ``[B, N]`` float32: 0 for the smallest and 1 for the largest of a row, 0 where N is 1.
    """
    order = guide.argsort(dim=-1, stable=True)
    places = torch.arange(guide.shape[-1], device=guide.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(-1, order, places)
    return ranks.float() / max(1, guide.shape[-1] - 1)
