"""Which tokens are informative: the guides that tell token merging what to keep apart.

A guide is one number per token, higher for what should merge last. It selects and is never differentiated. Guides of
different origin are made comparable by their rank within the image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mlip_kernels._tracing import stable_argsort
from mlip_kernels.merging import MergePlan


class GuideContext(NamedTuple):
    """What a guide can read, in the block that is about to merge; nothing of it requires a gradient."""

    tokens: Tensor
    """``[B, N, D]``: behind attention, before the MLP; prefix tokens first."""
    query: Tensor
    """``[B, heads, head_dim]``: the query of the first token."""
    keys: Tensor
    """``[B, heads, N, head_dim]``"""
    size: Tensor | None
    """``[B, N]`` patches that each token stands for, 0 where it is padding; ``None`` means ones."""
    plans: tuple[MergePlan, ...]
    """What has merged so far, one plan a merge."""
    energy: Tensor | None
    """``[B, N]`` high-frequency energy of the embedded patches, averaged where they merged, if it was asked for."""
    frequency_tokens: Tensor | None
    """``[B, N, D']`` tokens of a Frequency Stage, averaged where patches merged; prefix rows hold anything."""
    pooled_frequency: Tensor | None
    """``[B, D']`` the frequency tokens of an image in one."""
    grid: tuple[int, int] | None
    """Patches in a column and in a row before the first block; ``None`` where some were left out."""
    prefix_tokens: int
    """Leading class and register tokens."""
    class_token: bool
    """Whether the first token is a class token."""

    @property
    def origin(self) -> Tensor:
        """``[B, N0]`` int64: the token that each token before the first block has become."""
        return origin_of(self.tokens, self.plans)


Guide = Callable[[GuideContext], Tensor]
"""How informative each token is, ``[B, N]``; entries of prefix tokens are not read."""


def spatial(context: GuideContext) -> Tensor:
    """Rank in the attention that the class token pays, in [0, 1]; without a class token, `key_norm`."""
    if not context.class_token:
        return key_norm(context)
    attention = class_attention(context.query, context.keys, context.size)
    return _rank_patches(attention, context.prefix_tokens)


def key_norm(context: GuideContext) -> Tensor:
    """Rank in the length of the keys, averaged over heads, in [0, 1]: long keys move the attention of all queries."""
    return _rank_patches(torch.linalg.vector_norm(context.keys.float(), dim=-1).mean(1), context.prefix_tokens)


def frequency(context: GuideContext) -> Tensor:
    """Rank in the high-frequency energy of the patches, in [0, 1].

    The energy is computed once, where the tokens are a grid, and merged with the tokens. Where frequency tokens take
    its place, it is the rank in their similarity to the pooled one.
    """
    if context.energy is not None:
        return _rank_patches(context.energy, context.prefix_tokens)
    if context.frequency_tokens is not None and context.pooled_frequency is not None:
        similarity = similarity_to_pooled(context.frequency_tokens, context.pooled_frequency)
        return _rank_patches(similarity, context.prefix_tokens)
    if context.grid is None:
        raise ValueError("guide: 'frequency' needs all patches of a grid, but some were left out (patch dropout)")
    raise ValueError("guide: 'frequency' needs the energy of the patches or tokens of a Frequency Stage, got neither")


def both(context: GuideContext) -> Tensor:
    """Mean of `spatial` and `frequency`."""
    return (spatial(context) + frequency(context)) / 2


READS_ENERGY: tuple[Guide, ...] = (frequency, both)
"""The guides that need `GuideContext.energy`."""

GUIDES: dict[str, Guide] = {"spatial": spatial, "key_norm": key_norm, "frequency": frequency, "both": both}


def origin_of(tokens: Tensor, plans: tuple[MergePlan, ...]) -> Tensor:
    """``[B, N0]`` int64: which of ``tokens [B, N, D]`` each token before the first of ``plans`` has become."""
    if not plans:
        batch, count = tokens.shape[:2]
        return torch.arange(count, device=tokens.device).expand(batch, count)
    origin = plans[0].track()
    for plan in plans[1:]:
        origin = plan.track(origin)
    return origin


def _rank_patches(guide: Tensor, prefix_tokens: int) -> Tensor:
    """`rank` of all tokens but the prefix, whose entries are 0."""
    ranks = torch.zeros_like(guide, dtype=torch.float32)
    _write_ranks(guide[:, prefix_tokens:], ranks[:, prefix_tokens:])
    return ranks


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
    # Not a matrix product: the library would copy the keys, which are a part of the rows of qkv, to read them once.
    query = query.float() * query.shape[-1] ** -0.5
    logits = (keys * query[:, :, None]).sum(-1, dtype=torch.float32)
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
    ranks = torch.empty_like(guide, dtype=torch.float32)
    _write_ranks(guide, ranks)
    return ranks


def _write_ranks(guide: Tensor, ranks: Tensor) -> None:
    """Fill ``ranks`` as `rank` says."""
    count = guide.shape[-1]
    order = stable_argsort(guide, dim=-1)
    places = torch.arange(count, dtype=torch.float32, device=guide.device).div_(max(1, count - 1))
    ranks.scatter_(-1, order, places.expand_as(order))
