"""timm's transformer blocks with a merge between attention and MLP, where ToMe and EViT put it.

They are timm's blocks where they are given tokens. Given a `MergeState`, tokens and all that has to shrink with them,
they return one. The image tower of the model and patched models of timm both run on `merging_states`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlip_kernels.nn.attention import Attended, attend
from mlip_kernels.nn.granularity import three_way_plan
from mlip_kernels.nn.guidance import Guide, GuideContext, origin_of
from mlip_kernels.ops.merging import MergePlan, merge_plan

Amount = int | tuple[float, float]
"""What one block merges: r tokens, 0 for none, or the shares of `three_way_plan`."""


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
    max_merges: int | None = None
    """How many tokens may merge into one at most, in one block; ``None``: any number."""


class MergeState(NamedTuple):
    """Tokens on their way through the blocks."""

    tokens: Tensor
    """``[B, N, D]``"""
    size: Tensor | None = None
    """``[B, N]`` float32: patches that each token stands for, 0 for padding; ``None`` means ones."""
    plans: tuple[MergePlan, ...] = ()
    """One plan a merge, from the tokens before the first block to these."""
    mask: Tensor | None = None
    """``[B, N]``, True for real tokens; ``None`` means all."""
    energy: Tensor | None = None
    """``[B, N]`` high-frequency energy of the patches, where the guide reads it."""
    frequency_tokens: Tensor | None = None
    """``[B, N, D']`` tokens of another branch, which merge with their patches; prefix rows hold anything."""
    pooled_frequency: Tensor | None = None
    """``[B, D']`` the other branch's tokens in one, where the guide reads it."""
    grid: tuple[int, int] | None = None
    """Patches in a column and in a row before the first block."""

    @property
    def plan(self) -> MergePlan | None:
        """All plans as one; ``None`` before the first merge."""
        whole = None
        for plan in self.plans:
            whole = plan if whole is None else whole.then(plan)
        return whole

    @property
    def origin(self) -> Tensor:
        """``[B, N0]`` int64: the token that each token before the first block has become."""
        return origin_of(self.tokens, self.plans)


def merging_states(
    blocks: Iterable[nn.Module],
    state: MergeState,
    amounts: Iterable[Amount],
    rule: MergeRule,
    *,
    checkpointing: bool = False,
    **attention: Any,
) -> Iterator[MergeState]:
    """The states behind each block, one after the other.

    As long as every token counts once, blocks that merge nothing get plain tokens: what they compute then is timm's
    own to the bit.

    Args:
        blocks: `MergingBlock` and `MergingResPostBlock`.
        state: what goes into the first of them.
        amounts: what each block merges.
        rule: how it chooses.
        checkpointing: recompute the blocks in the backward pass.
        attention: arguments of blocks that get plain tokens.
    """
    recompute = checkpointing and torch.is_grad_enabled()

    def run(block: nn.Module, x: Any, **named: Any) -> Any:
        return checkpoint(block, x, use_reentrant=False, **named) if recompute else block(x, **named)

    for block, amount in zip(blocks, amounts, strict=False):
        if amount == 0 and state.size is None:
            state = state._replace(tokens=run(block, state.tokens, **attention))
        else:
            state = run(block, state, amount=amount, rule=rule)
        yield state


def last_state(states: Iterator[MergeState]) -> MergeState:
    """The state behind the last block; those before it are let go on the way."""
    return deque(states, maxlen=1).pop()


class _Merging(nn.Module):
    """The forward that both blocks share; each says what its two branches are."""

    _attention_branch: Callable[[Tensor, Tensor | None, bool], Attended]
    _mlp_branch: Callable[[Tensor], Tensor]

    def forward(
        self,
        x: Any,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        amount: Amount = 0,
        rule: MergeRule | None = None,
    ) -> Any:
        """timm's forward for tokens; for a state, the same on its tokens and a merge of ``amount`` by ``rule``."""
        if not isinstance(x, MergeState) or rule is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        attended = self._attention_branch(x.tokens, _attention_size(x, rule), x.mask is not None)
        x = merged(x._replace(tokens=x.tokens + attended.tokens), attended, amount, rule)
        return x._replace(tokens=x.tokens + self._mlp_branch(x.tokens))


class MergingBlock(_Merging, Block):
    """timm's ``Block``."""

    def _attention_branch(self, tokens: Tensor, size: Tensor | None, padding: bool) -> Attended:
        attended = attend(self.attn, self.norm1(tokens), size, padding=padding)
        return attended._replace(tokens=self.drop_path1(self.ls1(attended.tokens)))

    def _mlp_branch(self, tokens: Tensor) -> Tensor:
        return self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))


class MergingResPostBlock(_Merging, ResPostBlock):
    """timm's ``ResPostBlock``, which normalises behind attention and MLP."""

    def _attention_branch(self, tokens: Tensor, size: Tensor | None, padding: bool) -> Attended:
        attended = attend(self.attn, tokens, size, padding=padding)
        return attended._replace(tokens=self.drop_path1(self.norm1(attended.tokens)))

    def _mlp_branch(self, tokens: Tensor) -> Tensor:
        return self.drop_path2(self.norm2(self.mlp(tokens)))


def merged(state: MergeState, attended: Attended, amount: Amount, rule: MergeRule) -> MergeState:
    """Merge tokens of a state: the metric is the mean of the keys over heads (ToMe, section 3)."""
    if amount == 0:
        return state
    guide = None
    if rule.guide is not None:
        with torch.no_grad():
            guide = rule.guide(_context(state, attended, rule))
    metric, size = attended.keys.mean(1), state.size
    if isinstance(amount, tuple):
        if guide is None:
            raise ValueError(f"guide: expected one to sort tokens into the shares {amount}, got None")
        if state.mask is not None:
            raise ValueError(f"mask: expected None where tokens merge by the shares {amount}, got a mask")
        plan = three_way_plan(metric, guide, amount, size=size, prefix_tokens=rule.prefix_tokens)
    else:
        plan = merge_plan(
            metric,
            amount,
            size=size,
            guide=guide,
            guide_weight=rule.guide_weight,
            prefix_tokens=rule.prefix_tokens,
            mask=state.mask,
            max_merges=rule.max_merges,
        )
    tokens, size = plan.merge(state.tokens)
    energy, frequency = state.energy, state.frequency_tokens
    return state._replace(
        tokens=tokens,
        size=size,
        plans=(*state.plans, plan),
        mask=plan.mask,
        energy=None if energy is None else plan.merge(energy[..., None])[0][..., 0],
        frequency_tokens=None if frequency is None else plan.merge(frequency)[0],
    )


def _context(state: MergeState, attended: Attended, rule: MergeRule) -> GuideContext:
    frequency, pooled = state.frequency_tokens, state.pooled_frequency
    return GuideContext(
        tokens=state.tokens.detach(),
        query=attended.query,
        keys=attended.keys,
        size=state.size,
        plans=state.plans,
        energy=state.energy,
        frequency_tokens=None if frequency is None else frequency.detach(),
        pooled_frequency=None if pooled is None else pooled.detach(),
        grid=state.grid,
        prefix_tokens=rule.prefix_tokens,
        class_token=rule.class_token,
    )


def _attention_size(state: MergeState, rule: MergeRule) -> Tensor | None:
    if rule.proportional_attention:
        return state.size
    return None if state.mask is None else state.mask.float()
