"""timm's transformer blocks with a merge between attention and MLP, where ToMe and EViT put it.

Blocks take and return tokens, so that hooks and wrappers of blocks (activation checkpointing, FSDP, counters) see what
they know. What else a merge reads and makes travels beside them in a `MergeStep`, one a block and forward pass; without
one, a block is timm's. The image tower of the model and patched models of timm both run on `merging_states`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlip_kernels.merging import MergePlan, merge_plan
from mlip_kernels.nn.attention import MergingAttention
from mlip_kernels.nn.granularity import three_way_plan
from mlip_kernels.nn.guidance import Guide, GuideContext, origin_of

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
    threshold: float | None = None
    """Cosine similarity below which tokens do not merge; ``None``: they merge however little they resemble."""


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


class MergeStep:
    """What one block reads and makes beside tokens, in one forward pass.

    A step belongs to one call of `merging_states`, so passes that overlap (threads, replicas, a model within itself)
    share nothing. A block that is run again on the same tokens, as activation checkpointing does in the backward pass,
    finds the plan of its first run and follows it. It is no dataclass: wrappers copy those, and would lose what the
    block makes.

    Args:
        state: what goes into the block.
        amount: what the block merges.
        rule: how it chooses.
    """

    def __init__(self, state: MergeState, amount: Amount, rule: MergeRule) -> None:
        self.state = state
        self.amount = amount
        self.rule = rule
        self.plan: MergePlan | None = None
        """What has merged, once the block has run; None where nothing has."""
        self.size: Tensor | None = None
        """The sizes behind the merge."""
        self._query: Tensor | None = None
        self._keys: Tensor | None = None

    @property
    def attention_size(self) -> Tensor | None:
        """``[B, N]`` sizes by which keys count in attention, or ``None`` for ones."""
        if self.rule.proportional_attention:
            return self.state.size
        return None if self.state.mask is None else self.state.mask.float()

    @property
    def padding(self) -> bool:
        """Whether sizes of 0 may occur."""
        return self.state.mask is not None

    def attended(self, query: Tensor, keys: Tensor) -> None:
        """Note what a plan is made from: the query of the first token and the keys, as in `Attended`."""
        if self.amount != 0 and self.plan is None:
            self._query, self._keys = query, keys

    def merge(self, tokens: Tensor) -> Tensor:
        """Merge tokens between attention and MLP; the metric is the mean of the keys over heads (ToMe, section 3)."""
        if self.amount == 0:
            return tokens
        if self.plan is None:
            self.plan = self._chosen(tokens)
            self._query = self._keys = None
        tokens, self.size = self.plan.merge(tokens)
        return tokens

    def _chosen(self, tokens: Tensor) -> MergePlan:
        state, rule, query, keys = self.state, self.rule, self._query, self._keys
        if query is None or keys is None:
            raise TypeError("block.attn: expected it to call the forward of MergingAttention, but it did not")
        guide = None
        if rule.guide is not None:
            with torch.no_grad():
                guide = rule.guide(_context(state._replace(tokens=tokens), query, keys, rule))
        metric = keys.mean(1)
        if isinstance(self.amount, tuple):
            if guide is None:
                raise ValueError(f"guide: expected one to sort tokens into the shares {self.amount}, got None")
            if state.mask is not None:
                raise ValueError(f"mask: expected None where tokens merge by the shares {self.amount}, got a mask")
            return three_way_plan(metric, guide, self.amount, size=state.size, prefix_tokens=rule.prefix_tokens)
        return merge_plan(
            metric,
            self.amount,
            size=state.size,
            guide=guide,
            guide_weight=rule.guide_weight,
            prefix_tokens=rule.prefix_tokens,
            mask=state.mask,
            max_merges=rule.max_merges,
            threshold=rule.threshold,
        )


def merging_states(
    blocks: Iterable[nn.Module],
    state: MergeState,
    amounts: Iterable[Amount],
    rule: MergeRule,
    *,
    checkpointing: bool = False,
    arguments: Callable[[int, MergeState], dict[str, Any]] | None = None,
    **attention: Any,
) -> Iterator[MergeState]:
    """The states behind each block, one after the other.

    As long as every token counts once, blocks that merge nothing get plain tokens: what they compute then is timm's
    own to the bit.

    Args:
        blocks: `MergingBlock` and `MergingResPostBlock`, or modules that pass on to one what they are called with.
        state: what goes into the first of them.
        amounts: what each block merges.
        rule: how it chooses.
        checkpointing: recompute the blocks in the backward pass.
        arguments: what a block takes beside tokens, by its index and what goes into it: tables of positions.
        attention: arguments of blocks that get plain tokens.
    """
    recompute = checkpointing and torch.is_grad_enabled()
    for index, (block, amount) in enumerate(zip(blocks, amounts, strict=False)):
        own = {} if arguments is None else arguments(index, state)
        if amount == 0 and state.size is None:
            if recompute:
                tokens = checkpoint(block, state.tokens, use_reentrant=False, **own, **attention)
            else:
                tokens = block(state.tokens, **own, **attention)
            state = state._replace(tokens=tokens)
        else:
            tokens, plan, size = _stepped(block, state, amount, rule, recompute, own)
            state = _behind(state, tokens, plan, size)
        yield state


def last_state(states: Iterator[MergeState]) -> MergeState:
    """The state behind the last block; those before it are let go on the way."""
    return deque(states, maxlen=1).pop()


def _stepped(
    block: nn.Module, state: MergeState, amount: Amount, rule: MergeRule, recompute: bool, arguments: dict[str, Any]
) -> tuple[Tensor, MergePlan | None, Tensor | None]:
    """The tokens behind a block, and the plan and the sizes where it has merged."""

    def run(tokens: Tensor, step: MergeStep | None, **named: Any) -> tuple[Tensor, MergePlan | None, Tensor | None]:
        step = MergeStep(state, amount, rule) if step is None else step
        return block(tokens, merging=step, **named), step.plan, step.size

    if not recompute:
        return run(state.tokens, None, **arguments)
    # A graph traces the block once and may not change what was there before. Eager mode runs it twice, for one plan.
    step = None if torch.compiler.is_compiling() else MergeStep(state, amount, rule)
    return checkpoint(run, state.tokens, step, use_reentrant=False, **arguments)


def _behind(state: MergeState, tokens: Tensor, plan: MergePlan | None, size: Tensor | None) -> MergeState:
    """The state behind a block. What merges with the tokens does so here, where its gradient passes no wrapper."""
    if plan is None:
        return state._replace(tokens=tokens)
    energy, frequency = state.energy, state.frequency_tokens
    return state._replace(
        tokens=tokens,
        size=size,
        plans=(*state.plans, plan),
        mask=plan.mask,
        energy=None if energy is None else plan.merge(energy[..., None])[0][..., 0],
        frequency_tokens=None if frequency is None else plan.merge(frequency)[0],
    )


class _Merging(nn.Module):
    """The forward that both blocks share; each says what its two branches are."""

    _attention_branch: Callable[[Tensor, MergeStep], Tensor]
    _mlp_branch: Callable[[Tensor], Tensor]

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        merging: MergeStep | None = None,
    ) -> Tensor:
        """timm's forward; with a step, ``[B, N', D]``: it merges tokens between attention and MLP."""
        if merging is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        x = merging.merge(x + self._attention_branch(x, merging))
        return x + self._mlp_branch(x)


class MergingBlock(_Merging, Block):
    """timm's ``Block``."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        _let_attention_merge(self.attn)

    def _attention_branch(self, tokens: Tensor, merging: MergeStep) -> Tensor:
        return self.drop_path1(self.ls1(self.attn(self.norm1(tokens), merging=merging)))

    def _mlp_branch(self, tokens: Tensor) -> Tensor:
        return self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))


class MergingResPostBlock(_Merging, ResPostBlock):
    """timm's ``ResPostBlock``, which normalises behind attention and MLP."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        _let_attention_merge(self.attn)

    def _attention_branch(self, tokens: Tensor, merging: MergeStep) -> Tensor:
        return self.drop_path1(self.norm1(self.attn(tokens, merging=merging)))

    def _mlp_branch(self, tokens: Tensor) -> Tensor:
        return self.drop_path2(self.norm2(self.mlp(tokens)))


def _let_attention_merge(attention: nn.Module) -> None:
    if type(attention) is not Attention:
        raise TypeError(f"block.attn: expected timm.layers.Attention, got {type(attention).__name__}")
    attention.__class__ = MergingAttention


def _context(state: MergeState, query: Tensor, keys: Tensor, rule: MergeRule) -> GuideContext:
    frequency, pooled = state.frequency_tokens, state.pooled_frequency
    return GuideContext(
        tokens=state.tokens.detach(),
        query=query,
        keys=keys,
        size=state.size,
        plans=state.plans,
        energy=state.energy,
        frequency_tokens=None if frequency is None else frequency.detach(),
        pooled_frequency=None if pooled is None else pooled.detach(),
        grid=state.grid,
        prefix_tokens=rule.prefix_tokens,
        class_token=rule.class_token,
    )
