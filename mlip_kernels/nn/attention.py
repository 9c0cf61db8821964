"""timm's attention for merged tokens: keys count by their size, and what matching and guiding read comes back."""

from __future__ import annotations

from typing import NamedTuple

from timm.layers import Attention
from torch import Tensor, nn

from mlip_kernels.ops.merging import proportional_attention


class Attended(NamedTuple):
    """What `attend` returns."""

    tokens: Tensor
    """``[B, N, D]``"""
    query: Tensor
    """``[B, heads, head_dim]``: the query of the first token, detached."""
    keys: Tensor
    """``[B, heads, N, head_dim]``, detached."""


def attend(module: nn.Module, tokens: Tensor, size: Tensor | None, *, padding: bool = True) -> Attended:
    """timm's ``Attention`` with size-proportional logits.

    Args:
        module: a timm ``Attention``; any other kind is refused, since its forward could mean something else.
        tokens: ``[B, N, D]``, normalised.
        size: ``[B, N]`` patches that each token stands for, 0 for tokens that nobody attends to, or ``None``.
        padding: whether sizes of 0 may occur.

    Raises:
        TypeError: if ``module`` is not timm's ``Attention``.
    """
    if type(module) is not Attention:
        raise TypeError(f"block.attn: expected timm.layers.Attention, got {type(module).__name__}")
    batch, count, _ = tokens.shape
    qkv = module.qkv(tokens).reshape(batch, count, 3, module.num_heads, module.head_dim).permute(2, 0, 3, 1, 4)
    query, keys, values = qkv.unbind(0)
    query, keys = module.q_norm(query), module.k_norm(keys)
    dropout = module.attn_drop.p if module.training else 0.0
    attended = proportional_attention(query, keys, values, size, dropout_p=dropout, padding=padding)
    attended = module.norm(attended.transpose(1, 2).reshape(batch, count, module.attn_dim))
    gate = getattr(module, "gate", None)  # newer timm
    if gate is not None:
        attended = attended * gate(tokens).sigmoid()
    return Attended(module.proj_drop(module.proj(attended)), query[:, :, 0].detach(), keys.detach())
