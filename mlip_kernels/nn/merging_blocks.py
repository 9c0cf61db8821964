"""timm's transformer blocks with a merge between attention and MLP, where ToMe and EViT put it.

They are timm's blocks where they are given tokens. Given a `MergeState`, tokens and all that has to shrink with them,
they return one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor

from mlip_kernels.nn.attention import Attended, attend
from mlip_kernels.nn.guidance import Guide, GuideContext
from mlip_kernels.ops.merging import MergePlan, merge_plan


@dataclass(frozen=True)
class MergeRule:
    """How tokens are chosen and how attention treats merged ones; the same in all blocks of a model."""

    prefix_tokens: int
    """Leading class and register tokens, which never merge."""
    class_token: bool
    """Whether the first of them is a class token."""
    guide: Guide | None
    """How informative tokens are: informative ones merge last. ``None``: similarity alone decides."""
    guide_weight: float
    """Factor of the guide."""
    proportional_attention: bool
    """Whether a merged token attracts as much attention as the patches it stands for."""


class MergeState(NamedTuple):
    """Tokens on their way through the blocks."""

    tokens: Tensor
    """``[B, N, D]``"""
    size: Tensor | None
    """``[B, N]`` float32: patches that each token stands for, 0 for padding; ``None`` means ones."""
    plan: MergePlan | None
    """From the tokens before the first block to these; ``None`` before the first merge."""
    mask: Tensor | None
    """``[B, N]``, True for real tokens; ``None`` means all."""
    energy: Tensor | None
    """``[B, N]`` high-frequency energy of the patches, where the guide reads it."""
    grid: tuple[int, int] | None
    """Patches in a column and in a row before the first block."""


class MergingBlock(Block):
    """timm's ``Block``."""

    def forward(
        self,
        x: Any,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        r: int = 0,
        rule: MergeRule | None = None,
    ) -> Any:
        """timm's forward for tokens; for a state, the same on its tokens and a merge of r tokens by ``rule``."""
        if not isinstance(x, MergeState) or rule is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        attended = attend(self.attn, self.norm1(x.tokens), _attention_size(x, rule))
        tokens = x.tokens + self.drop_path1(self.ls1(attended.tokens))
        x = merged(x._replace(tokens=tokens), attended, r, rule)
        return x._replace(tokens=x.tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(x.tokens)))))


class MergingResPostBlock(ResPostBlock):
    """timm's ``ResPostBlock``, which normalises behind attention and MLP."""

    def forward(
        self,
        x: Any,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        r: int = 0,
        rule: MergeRule | None = None,
    ) -> Any:
        """As `MergingBlock`."""
        if not isinstance(x, MergeState) or rule is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        attended = attend(self.attn, x.tokens, _attention_size(x, rule))
        tokens = x.tokens + self.drop_path1(self.norm1(attended.tokens))
        x = merged(x._replace(tokens=tokens), attended, r, rule)
        return x._replace(tokens=x.tokens + self.drop_path2(self.norm2(self.mlp(x.tokens))))


def merged(state: MergeState, attended: Attended, r: int, rule: MergeRule) -> MergeState:
    """Merge r tokens of a state: the metric is the mean of the keys over heads (ToMe, section 3)."""
    if r == 0:
        return state
    guide = None
    if rule.guide is not None:
        with torch.no_grad():
            guide = rule.guide(_context(state, attended, rule))
    plan = merge_plan(
        attended.keys.mean(1),
        r,
        size=state.size,
        guide=guide,
        guide_weight=rule.guide_weight,
        prefix_tokens=rule.prefix_tokens,
        mask=state.mask,
    )
    tokens, size = plan.merge(state.tokens)
    energy = None if state.energy is None else plan.merge(state.energy[..., None])[0][..., 0]
    whole = plan if state.plan is None else state.plan.then(plan)
    return state._replace(tokens=tokens, size=size, plan=whole, mask=plan.mask, energy=energy)


def _context(state: MergeState, attended: Attended, rule: MergeRule) -> GuideContext:
    batch, count = state.tokens.shape[:2]
    if state.plan is None:
        origin = torch.arange(count, device=state.tokens.device).expand(batch, count)
    else:
        origin = state.plan.assignment
    return GuideContext(
        tokens=state.tokens.detach(),
        query=attended.query,
        keys=attended.keys,
        size=state.size,
        origin=origin,
        energy=state.energy,
        grid=state.grid,
        prefix_tokens=rule.prefix_tokens,
        class_token=rule.class_token,
    )


def _attention_size(state: MergeState, rule: MergeRule) -> Tensor | None:
    if rule.proportional_attention:
        return state.size
    return None if state.mask is None else state.mask.float()
