"""What an `MLIP` returns for its loss: pairs of features and of tokens, each with its learned scale."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class GlobalPair(NamedTuple):
    """One feature an image and one a caption, to be contrasted."""

    image: Tensor
    """``[B, embed_dim]``, unit length."""
    text: Tensor
    """``[B, embed_dim]``, unit length."""
    scale: Tensor
    """0-d, the learned logit scale."""


class TokenPair(NamedTuple):
    """Tokens of images and of captions, to be contrasted by the mean of their maximal similarities."""

    image: Tensor
    """``[B, N, token_dim]``, unit length."""
    text: Tensor
    """``[B, M, token_dim]``, unit length."""
    scale: Tensor
    """0-d, the learned logit scale."""
    image_weight: Tensor | None
    """``[B, N]`` patches that each image token stands for, or ``None`` where all count alike."""
    text_mask: Tensor
    """``[B, M]``, True for text tokens that take part."""


class MLIPFeatures(NamedTuple):
    """All that the loss reads, one entry per contrastive term that the configuration gives a weight."""

    pairs: dict[str, GlobalPair]
    """``global_spatial`` always, ``global_frequency``."""
    token_pairs: dict[str, TokenPair]
    """``token_spatial`` and ``token_frequency``, or ``token_union``."""
    image_frequency: Tensor | None
    """``[B, embed_dim]`` frequency image feature, unit length, where a term reads it."""
