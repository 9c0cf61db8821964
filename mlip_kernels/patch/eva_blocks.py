"""timm's EVA blocks with a merge between attention and MLP, and their attention with rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from mlip_kernels.nn.attention import Attending, attend_by_size
from mlip_kernels.nn.merging_blocks import MergeStep
from mlip_kernels.patch.states import given


class _Attending(nn.Module):
    """The forward that both kinds of attention share; each says how tokens become queries, keys and values."""

    _projected: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        merging: Attending | None = None,
    ) -> Tensor:
        """timm's forward; with ``merging``, keys count by the sizes of its tokens.

        What is matched is the keys with their rotation, as attention sees them, so that tokens are alike where content
        and position are.
        """
        if merging is None:
            return super().forward(x, rope=rope, **given(attn_mask, is_causal))
        module: Any = self
        query, keys, values = self._projected(x)
        query, keys = module.q_norm(query), module.k_norm(keys)
        if rope is not None:
            query, keys = self._rotated(query, rope).type_as(values), self._rotated(keys, rope).type_as(values)
        groups = getattr(self, "num_kv_groups", 1)
        if groups > 1:  # grouped-query attention
            keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
        attended = attend_by_size(self, query, keys, values, merging.attention_size, padding=merging.padding)
        merging.attended(query[:, :, 0].detach(), keys.detach())
        attended = module.norm(attended.transpose(1, 2).flatten(2))
        gate = getattr(self, "gate", None)  # newer timm
        if gate is not None:
            attended = attended * gate(x).sigmoid()
        return module.proj_drop(module.proj(attended))

    def _rotated(self, heads: Tensor, rope: Tensor) -> Tensor:
        """``[B, heads, N, head_dim]``, all but the prefix tokens rotated."""
        prefix: Any = self.num_prefix_tokens
        patches = apply_rot_embed_cat(heads[:, :, prefix:], rope, half=getattr(self, "rotate_half", False))
        return torch.cat([heads[:, :, :prefix], patches], dim=2)


class MergingEvaAttention(_Attending, EvaAttention):
    """timm's ``EvaAttention``, which attends in proportion to sizes where a merge says so."""

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv is None:
            return _heads(self.num_heads, self.q_proj(x), self.k_proj(x), self.v_proj(x))
        if self.q_bias is None:
            qkv = self.qkv(x)
        else:
            biases: Any = (self.q_bias, self.k_bias, self.v_bias)
            bias = torch.cat(biases)
            qkv = self.qkv(x) + bias if self.qkv_bias_separate else F.linear(x, self.qkv.weight, bias)
        return _heads(self.num_heads, *qkv.chunk(3, dim=-1))


class MergingAttentionRope(_Attending, AttentionRope):
    """timm's ``AttentionRope``, which attends in proportion to sizes where a merge says so."""

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv is not None:
            return _heads(self.num_heads, *self.qkv(x).chunk(3, dim=-1))
        query, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return tuple(part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (query, keys, values))


def _heads(heads: int, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, heads, N, head_dim]`` each."""
    query, keys, values = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, keys, values))
    return query, keys, values


class _Merging(nn.Module):
    """The forward that both blocks share; each says what its two branches are."""

    _attention_branch: Callable[[Tensor, Tensor | None, MergeStep], Tensor]
    _mlp_branch: Callable[[Tensor], Tensor]

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        merging: MergeStep | None = None,
    ) -> Tensor:
        """timm's forward; with a step, ``[B, N', D]``: it merges tokens between attention and MLP.

        ``rope`` is the table for the tokens of ``x``: ``[B, 1 or heads, N - prefix_tokens, 2 * head_dim]`` where some
        have merged before.
        """
        if merging is None:
            return super().forward(x, rope=rope, **given(attn_mask, is_causal))
        x = merging.merge(x + self._attention_branch(x, rope, merging))
        return x + self._mlp_branch(x)


class MergingEvaBlock(_Merging, EvaBlock):
    """timm's ``EvaBlock``, LayerScale included."""

    def _attention_branch(self, tokens: Tensor, rope: Tensor | None, merging: MergeStep) -> Tensor:
        attended = self.attn(self.norm1(tokens), rope=rope, merging=merging)
        return self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)

    def _mlp_branch(self, tokens: Tensor) -> Tensor:
        out = self.mlp(self.norm2(tokens))
        return self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


class MergingEvaBlockPostNorm(_Merging, EvaBlockPostNorm):
    """timm's ``EvaBlockPostNorm``, which normalises behind attention and MLP."""

    def _attention_branch(self, tokens: Tensor, rope: Tensor | None, merging: MergeStep) -> Tensor:
        return self.drop_path1(self.norm1(self.attn(tokens, rope=rope, merging=merging)))

    def _mlp_branch(self, tokens: Tensor) -> Tensor:
        return self.drop_path2(self.norm2(self.mlp(tokens)))


BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    EvaBlock: MergingEvaBlock,
    EvaBlockPostNorm: MergingEvaBlockPostNorm,
}
ATTENTIONS: dict[type[nn.Module], type[nn.Module]] = {
    EvaAttention: MergingEvaAttention,
    AttentionRope: MergingAttentionRope,
}
