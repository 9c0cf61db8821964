"""open_clip's ``VisionTransformer`` with blocks that merge: what `mlip_kernels.patch.open_clip` makes of a model.

Only the transformer inside the image tower changes what it computes. It returns one token for every patch, so that the
tower's own pooling, projection, ``output_tokens`` and ``forward_intermediates`` work as they are, and hooks of the
transformer see what they know. An average over patches then counts a merged token for all it stands for, and so do the
keys of an attention pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from open_clip.utils import feature_take_indices
from torch import Tensor, nn

from mlip_kernels.merging import proportional_attention
from mlip_kernels.nn.attention import Attending
from mlip_kernels.nn.merging_blocks import MergeState, MergeStep, last_state
from mlip_kernels.patch.settings import Merging, Rate, changed
from mlip_kernels.patch.states import Merged, block_states, in_original_order, known, tokens_of


class MergingMultiheadAttention(nn.MultiheadAttention):
    """torch's attention of tokens to themselves, in proportion to sizes where a merge says so."""

    def forward(
        self, query: Tensor, *arguments: Any, merging: Attending | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """torch's forward; with ``merging``, ``query [B, N, D]`` attends to itself by the sizes of its tokens."""
        if merging is None:
            return super().forward(query, *arguments, **options)
        heads = _heads(F.linear(query, self.in_proj_weight, self.in_proj_bias), self.num_heads)
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(_attended(*heads, merging, dropout).transpose(1, 2).flatten(2)), None


class MergingAttention(Attention):
    """open_clip's ``Attention``, which attends in proportion to sizes where a merge says so."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, *, merging: Attending | None = None) -> Tensor:
        """open_clip's forward; with ``merging``, by the sizes of its tokens."""
        if merging is None:
            return super().forward(x, attn_mask=attn_mask)
        query, keys, values = _heads(F.linear(x, self.in_proj_weight, self.in_proj_bias), self.num_heads)
        dropout = self.attn_drop.p if self.training else 0.0
        attended = _attended(self.ln_q(query), self.ln_k(keys), values, merging, dropout)
        if self.head_scale is not None:
            attended = attended * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(attended.transpose(1, 2).flatten(2))))


def _heads(projected: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, heads, N, head_dim]``."""
    query, keys, values = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected.chunk(3, dim=-1))
    return query, keys, values


def _attended(query: Tensor, keys: Tensor, values: Tensor, merging: Attending, dropout: float) -> Tensor:
    size = merging.attention_size
    attended = proportional_attention(query, keys, values, size, dropout_p=dropout, padding=merging.padding)
    merging.attended(query[:, :, 0].detach(), keys.detach())
    return attended


class MergingResidualAttentionBlock(ResidualAttentionBlock):
    """open_clip's block around torch's attention, with a merge between attention and MLP."""

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
        *,
        merging: MergeStep | None = None,
    ) -> Tensor:
        """open_clip's forward; with a step, ``[B, N', D]``: it merges tokens between attention and MLP."""
        if merging is None:
            return super().forward(q_x, k_x=k_x, v_x=v_x, attn_mask=attn_mask)
        x = self.ln_1(q_x)
        x = merging.merge(q_x + self.ls_1(self.attn(x, x, x, need_weights=False, merging=merging)[0]))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class MergingCustomResidualAttentionBlock(CustomResidualAttentionBlock):
    """open_clip's block around its own attention, with a merge between attention and MLP."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, *, merging: MergeStep | None = None) -> Tensor:
        """open_clip's forward; with a step, ``[B, N', D]``: it merges tokens between attention and MLP."""
        if merging is None:
            return super().forward(x, attn_mask=attn_mask)
        x = merging.merge(x + self.ls_1(self.ln_attn(self.attn(self.ln_1(x), merging=merging))))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class MergingTransformer(Transformer):
    """The transformer of an image tower, whose blocks merge; it takes and returns one token for every patch.

    Blocks learn from it what to merge. Called one by one they are open_clip's and merge nothing.
    """

    merging: Merging
    grid_size: tuple[int, int]
    """Patches in a column and in a row of the images that the tower takes."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, *, merged: bool = False) -> Any:
        """open_clip's forward; with ``merged``, the tokens, sizes and plan behind the last block."""
        state = last_state(self._states(x, attn_mask))
        return (state.tokens, state.size, state.plan) if merged else tokens_of(state)

    def forward_intermediates(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        indices: int | list[int] | None = None,
        stop_early: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """As open_clip's own: every patch has the token it has merged into."""
        taken, last = feature_take_indices(len(self.resblocks), indices)
        intermediates = []
        for index, state in enumerate(self._states(x, attn_mask, last + 1 if stop_early else None)):
            if index in taken:
                intermediates.append(tokens_of(state))
        return tokens_of(state), intermediates

    def _states(self, tokens: Tensor, attn_mask: Tensor | None, blocks: int | None = None) -> Iterator[MergeState]:
        """The states behind the first ``blocks`` blocks, or behind all."""
        merging, depth = self.merging, len(self.resblocks)
        height, width = self.grid_size
        patches = known(tokens.shape[1]) - 1
        schedule = [0] * depth
        if self.training or not merging.training_only:
            schedule = merging.schedule(depth, patches)
        if attn_mask is not None and any(schedule):
            raise ValueError("attn_mask: expected None while tokens merge, got a tensor")
        given: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
        return block_states(
            list(self.resblocks)[:blocks],
            tokens,
            schedule,
            merging,
            prefix_tokens=1,
            class_token=True,
            grid=(height, width) if patches == height * width else None,  # patch dropout leaves no grid
            checkpointing=self.grad_checkpointing,
            **given,
        )


class MergingVisionTransformer(VisionTransformer):
    """The image tower around a `MergingTransformer`."""

    @property
    def merging(self) -> Merging:
        """The settings."""
        return self.transformer.merging

    @property
    def r(self) -> Rate:
        """Tokens to merge in each block; for a model with a keep rate, a list."""
        depth, merging = len(self.transformer.resblocks), self.merging
        if merging.keep_rate is not None:
            return merging.schedule(depth, self._patches())
        return merging.r[:depth] if isinstance(merging.r, list) else merging.r

    @r.setter
    def r(self, r: Rate) -> None:
        self.set_merging(r=r)

    def set_merging(self, **settings: Any) -> None:
        """Change some of the settings that `mlip_kernels.patch.open_clip.apply` takes, by its names; others stay."""
        depth = len(self.transformer.resblocks)
        self.transformer.merging = changed(self.merging, depth, self._patches(), settings)

    def forward(self, x: Tensor, *, merged: bool = False) -> Any:
        """open_clip's forward; with ``merged``, what `forward_merged` returns."""
        if not merged:
            return super().forward(x)
        tokens, size, plan = self.transformer(self._embeds(x), merged=True)
        normalised = self.attn_pool is None and not self.final_ln_after_pool
        return self.ln_post(tokens) if normalised else tokens, size, plan

    def forward_merged(self, x: Tensor, *, original_order: bool = False) -> Merged:
        """The merged tokens themselves.

        It is ``visual(x, merged=True)``, so hooks of the tower run, those of FSDP among them.

        Args:
            x: images.
            original_order: sort the tokens by where they come from (`MergePlan.in_original_order`).

        Returns:
            ``tokens [B, N', D]``, normalised where the tower normalises tokens before it pools them;
            ``size [B, N']``, the patches each stands for, 0 for padding; and the plan that leads to them from the N
            tokens before the first block. The last two are None where nothing has merged.
        """
        tokens, size, plan = self(x, merged=True)
        if original_order and plan is not None:
            tokens, size, plan = in_original_order(tokens, size, plan)
        return tokens, size, plan

    def _patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]


ATTENTIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MergingMultiheadAttention,
    Attention: MergingAttention,
}
BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    ResidualAttentionBlock: MergingResidualAttentionBlock,
    CustomResidualAttentionBlock: MergingCustomResidualAttentionBlock,
}
TRANSFORMERS: dict[type[nn.Module], type[nn.Module]] = {Transformer: MergingTransformer}
TOWERS: dict[type[nn.Module], type[nn.Module]] = {VisionTransformer: MergingVisionTransformer}
