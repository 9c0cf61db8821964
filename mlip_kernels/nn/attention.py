"""timm's attention for merged tokens: keys count by their size, and what matching and guiding read comes back."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from timm.layers import Attention
from torch import Tensor, nn

from mlip_kernels.merging import proportional_attention


class Attended(NamedTuple):
    """What `attend` returns."""

    tokens: Tensor
    """``[B, N, D]``"""
    query: Tensor
    """``[B, heads, head_dim]``: the query of the first token, detached."""
    keys: Tensor
    """``[B, heads, N, head_dim]``, detached."""


class Attending(Protocol):
    """What `MergingAttention` reads of a merge, and whom it tells what it has seen."""

    @property
    def attention_size(self) -> Tensor | None:
        """``[B, N]`` sizes by which keys count, or ``None`` for ones."""

    @property
    def padding(self) -> bool:
        """Whether sizes of 0 may occur."""

    def attended(self, query: Tensor, keys: Tensor) -> None:
        """Take the query of the first token and the keys, as in `Attended`."""


class MergingAttention(Attention):
    """timm's ``Attention``, which attends in proportion to sizes where a merge says so."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        merging: Attending | None = None,
    ) -> Tensor:
        """timm's forward; with ``merging``, `attend` by its sizes."""
        if merging is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        tokens, query, keys = attend(self, x, merging.attention_size, padding=merging.padding)
        merging.attended(query, keys)
        return tokens


def attend(module: nn.Module, tokens: Tensor, size: Tensor | None, *, padding: bool = True) -> Attended:
    """timm's ``Attention`` with size-proportional logits.

    As in timm, the attention matrix is written out where ``module.fused_attn`` is false: ``module.scale`` is read and
    ``module.attn_drop`` is called with it (``[B, heads, N, N]``, rows that sum to 1), so that hooks there see it. Fused
    attention does neither.

    Args:
        module: a timm ``Attention``; any other kind is refused, since its forward could mean something else.
        tokens: ``[B, N, D]``, normalised.
        size: ``[B, N]`` patches that each token stands for, 0 for tokens that nobody attends to, or ``None``.
        padding: whether sizes of 0 may occur.

    Raises:
        TypeError: if ``module`` is not timm's ``Attention``.
    """
    if not isinstance(module, Attention):
        raise TypeError(f"block.attn: expected timm.layers.Attention, got {type(module).__name__}")
    batch, count, _ = tokens.shape
    qkv = module.qkv(tokens).reshape(batch, count, 3, module.num_heads, module.head_dim).permute(2, 0, 3, 1, 4)
    query, keys, values = qkv.unbind(0)
    query, keys = module.q_norm(query), module.k_norm(keys)
    attended = attend_by_size(module, query, keys, values, size, padding=padding)
    attended = module.norm(attended.transpose(1, 2).reshape(batch, count, module.attn_dim))
    gate = getattr(module, "gate", None)  # newer timm
    if gate is not None:
        attended = attended * gate(tokens).sigmoid()
    return Attended(module.proj_drop(module.proj(attended)), query[:, :, 0].detach(), keys.detach())


def attend_by_size(
    module: Any, query: Tensor, keys: Tensor, values: Tensor, size: Tensor | None, *, padding: bool
) -> Tensor:
    """What queries ``[B, heads, N, head_dim]`` attend to, in the shape of ``query``.

    Args:
        module: an attention of timm's: fused, or written out where its ``fused_attn`` is false.
        query, keys, values: ``[B, heads, N, head_dim]``.
        size, padding: as in `attend`.
    """
    if module.fused_attn:
        dropout = module.attn_drop.p if module.training else 0.0
        return proportional_attention(query, keys, values, size, dropout_p=dropout, padding=padding)
    return _written_out(module, query, keys, values, size, padding)


def _written_out(
    module: Any, query: Tensor, keys: Tensor, values: Tensor, size: Tensor | None, padding: bool
) -> Tensor:
    """``attn_drop(softmax(scale · q kᵀ + log size)) v``; a sample whose sizes are all 0 gives zeros."""
    scores = (query * module.scale) @ keys.transpose(-2, -1)
    dtype, empty = scores.dtype, None
    if size is not None:
        log_size = size.to(torch.promote_types(dtype, torch.float32)).log()[:, None, None]
        if padding:
            empty = (log_size == -torch.inf).all(-1, keepdim=True)
            log_size = log_size.masked_fill(empty, 0)
        scores = scores + log_size
    attention = scores.softmax(dim=-1)
    if not torch.is_autocast_enabled(scores.device.type):  # which keeps what softmax returns in float32, as timm's does
        attention = attention.to(dtype)
    if empty is not None:
        attention = attention.masked_fill(empty, 0)
    return module.attn_drop(attention) @ values
