"""Blocks of a patched model by its settings, whoever's model it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mlip_kernels.merging import MergePlan
from mlip_kernels.nn.merging_blocks import MergeRule, MergeState, merging_states
from mlip_kernels.patch.settings import Merging
from mlip_kernels.spectral import token_energy

Merged = tuple[Tensor, Tensor | None, MergePlan | None]
"""Tokens ``[B, N', D]``, the patches that each stands for ``[B, N']``, and the plan that leads to them."""


def block_states(
    blocks: Iterable[nn.Module],
    tokens: Tensor,
    schedule: list[int],
    merging: Merging,
    *,
    prefix_tokens: int,
    class_token: bool,
    grid: tuple[int, int] | None,
    mask: Tensor | None = None,
    checkpointing: bool = False,
    arguments: Callable[[int, MergeState], dict[str, Any]] | None = None,
    **attention: Any,
) -> Iterator[MergeState]:
    """The states behind each block, one after the other.

    Args:
        blocks: the blocks to run, each as `mlip_kernels.nn.merging_blocks.merging_states` takes it.
        tokens: ``[B, N, D]``, prefix tokens first.
        schedule: how many tokens each block merges; where nothing does, blocks get plain tokens.
        merging: the settings of the model.
        prefix_tokens, class_token: leading tokens that never merge, and whether the first is a class token.
        grid: patches in a column and in a row; ``None`` where some were left out.
        mask: ``[B, N]``, True for real tokens; ``None`` means all.
        checkpointing: recompute the blocks in the backward pass.
        arguments: what a block takes beside tokens, as in `mlip_kernels.nn.merging_blocks.merging_states`.
        attention: arguments of blocks that get plain tokens.
    """
    rule = MergeRule(
        prefix_tokens=prefix_tokens,
        class_token=class_token,
        guide=merging.guide,
        guide_weight=merging.guide_weight,
        proportional_attention=merging.proportional_attention,
        max_merges=merging.max_merges,
        threshold=merging.threshold,
    )
    state = MergeState(tokens)
    if any(schedule):
        energy, cutoff = None, merging.energy_cutoff
        if grid is not None and cutoff is not None:
            energy = token_energy(tokens.detach(), cutoff, grid=grid, prefix_tokens=prefix_tokens)
        state = state._replace(size=None if mask is None else mask.float(), mask=mask, grid=grid, energy=energy)
    return merging_states(blocks, state, schedule, rule, checkpointing=checkpointing, arguments=arguments, **attention)


def tokens_of(state: MergeState, *, every_patch: bool = True) -> Tensor:
    """The tokens of a state; with ``every_patch``, one for each token that there was before the first block."""
    plan = state.plan if every_patch else None
    return state.tokens if plan is None else plan.unmerge(state.tokens)


def in_original_order(tokens: Tensor, size: Tensor | None, plan: MergePlan) -> Merged:
    """Merged tokens, sorted by where they come from."""
    order = plan.original_order()
    tokens = tokens.gather(1, order[..., None].expand_as(tokens))
    return tokens, None if size is None else size.gather(1, order), plan.in_original_order()


def known(size: int) -> int:
    """A size as a number: ``torch.jit.trace`` has tensors instead, and fixes what depends on their values."""
    return int(size) if torch.jit.is_tracing() else size


def given(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """The arguments of a block that were given, and no others: those of older timm versions take less."""
    return ({} if attn_mask is None else {"attn_mask": attn_mask}) | ({"is_causal": True} if is_causal else {})
