"""Matching: which tokens merge into which, as row numbers.

A matching removes the same number of rows from every sample. `match_above` leaves unlike tokens apart, so that samples
merge different numbers of tokens: those that merge fewer drop padding instead, masked rows that the input is given
behind its last token, as few as the batch needs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_kernels._arguments import (
    check_integer,
    check_mask,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
    check_tokens,
    values_known,
)
from mlip_kernels._operator import Operator
from mlip_kernels._tracing import stable_argsort
from mlip_kernels.merging import plain
from mlip_kernels.merging.plain import Matching

_ARGUMENTS = "Tensor metric, SymInt r, Tensor? guide, float guide_weight, SymInt prefix_tokens, Tensor? mask"
_MATCHING = "(Tensor assignment, Tensor kept, Tensor removed, Tensor merged_mask, Tensor dropped)"


def check_matching(
    metric: Tensor,
    r: int,
    guide: Tensor | None = None,
    guide_weight: float = 1.0,
    prefix_tokens: int = 1,
    mask: Tensor | None = None,
) -> tuple[Any, ...]:
    """The arguments of a matching, ``r`` at most the number of pairs; nothing of them takes a gradient."""
    check_tokens("metric", metric)
    batch, tokens, _ = metric.shape
    r = check_integer("r", r, minimum=0)
    if guide is not None:
        check_tensor("guide", guide, layout="[B, N]")
        check_shape("guide", guide, (batch, tokens), "[B, N]")
        check_same_device("guide", guide, "metric", metric)
    guide_weight = check_number("guide_weight", guide_weight)
    prefix_tokens = check_integer("prefix_tokens", prefix_tokens, minimum=0, maximum=tokens)
    if mask is not None:
        mask = check_mask("mask", mask, (batch, tokens), "[B, N]", "metric", metric)
    r = min(r, (tokens - prefix_tokens) // 2)
    guide = None if guide is None or guide_weight == 0 else guide.detach()
    return metric.detach(), r, guide, guide_weight, prefix_tokens, mask


class MatchTokens(Operator):
    """``MatchTokens.apply(metric, r, guide=None, guide_weight=1.0, prefix_tokens=1, mask=None)``: see `merge_plan`.

    Returns ``(assignment, kept, removed, mask, dropped)``, the maps of `MergePlan`: integers and booleans, without
    gradient. Without a mask, the last two have no columns.
    """

    schema = f"merging_match({_ARGUMENTS}) -> {_MATCHING}"
    triton = "mlip_kernels.triton.merging.match:match"
    differentiable = 0
    check = staticmethod(check_matching)

    @staticmethod
    def takes(metric: Tensor, r: int, *arguments: Any) -> bool:
        return r > 0

    @staticmethod
    def compute(
        metric: Tensor,
        r: int,
        guide: Tensor | None,
        guide_weight: float,
        prefix_tokens: int,
        mask: Tensor | None,
        max_merges: int | None = None,
        threshold: float | None = None,
    ) -> tuple[Tensor, ...]:
        with torch.no_grad():
            assignment, kept, removed, merged_mask, dropped = plain.match(
                metric,
                r,
                guide=guide,
                guide_weight=guide_weight,
                prefix_tokens=prefix_tokens,
                mask=mask,
                max_merges=max_merges,
                threshold=threshold,
            )
        nothing = metric.new_empty(metric.shape[0], 0, dtype=torch.bool)
        return (
            assignment,
            kept.clone(),  # these two may be parts of one tensor, which results of an operator must not be
            removed.clone(),
            nothing if merged_mask is None else merged_mask,
            nothing.clone() if dropped is None else dropped,
        )

    plain = compute

    @staticmethod
    def fake(
        metric: Tensor,
        r: int,
        guide: Tensor | None,
        guide_weight: float,
        prefix_tokens: int,
        mask: Tensor | None,
        *limits: Any,
    ) -> tuple[Tensor, ...]:
        batch, tokens, _ = metric.shape
        rows = [metric.new_empty(batch, count, dtype=torch.int64) for count in (tokens, tokens - r, r)]
        flags = (0, 0) if mask is None else (tokens - r, tokens)
        return *rows, *(metric.new_empty(batch, count, dtype=torch.bool) for count in flags)


class MatchTokensCapped(Operator):
    """`MatchTokens` with at most ``max_merges`` sources a target: one more argument, at the end."""

    schema = f"merging_match_capped({_ARGUMENTS}, SymInt max_merges) -> {_MATCHING}"
    kernels = False
    differentiable = 0
    takes, compute, plain, fake = MatchTokens.takes, MatchTokens.compute, MatchTokens.compute, MatchTokens.fake

    @staticmethod
    def check(*arguments: Any) -> tuple[Any, ...]:
        *arguments, max_merges = arguments  # type: ignore[assignment]
        return *check_matching(*arguments), max_merges


class MatchTokensAbove(Operator):
    """`MatchTokensCapped`, or without a limit, of pairs whose cosine is at least ``threshold``: one more argument."""

    schema = f"merging_match_above({_ARGUMENTS}, SymInt? max_merges, float threshold) -> {_MATCHING}"
    kernels = False
    differentiable = 0
    takes, compute, plain, fake = MatchTokens.takes, MatchTokens.compute, MatchTokens.compute, MatchTokens.fake

    @staticmethod
    def check(*arguments: Any) -> tuple[Any, ...]:
        *arguments, max_merges, threshold = arguments  # type: ignore[assignment]
        return *check_matching(*arguments), max_merges, threshold


_match, _match_capped, _match_above = MatchTokens.call, MatchTokensCapped.call, MatchTokensAbove.call


def match(
    metric: Tensor,
    r: int,
    guide: Tensor | None,
    guide_weight: float,
    prefix_tokens: int,
    mask: Tensor | None,
    max_merges: int | None = None,
    threshold: float | None = None,
) -> plain.Matching:
    """The matching of `merge_plan`, under the limits that are not None."""
    arguments = metric, r, guide, guide_weight, prefix_tokens, mask
    if threshold is not None:
        maps = _match_above(*arguments, max_merges, threshold)
    else:
        maps = _match(*arguments) if max_merges is None else _match_capped(*arguments, max_merges)
    if mask is None:
        assignment, kept, removed, *_ = maps
        return plain.Matching(assignment, kept, removed, None, None)
    return plain.Matching(*maps)


def match_above(
    threshold: float,
    metric: Tensor,
    r: int,
    guide: Tensor | None,
    guide_weight: float,
    prefix_tokens: int,
    mask: Tensor | None,
    max_merges: int | None,
) -> tuple[Matching, int]:
    """The pairs of ``metric [B, N, D]`` whose cosine reaches ``threshold``, r at most.

    Returns:
        The matching of N + P rows, the last P of them padding, and P. Where no sample needs padding and there was no
        mask, the matching has none either. P is r where values are not known.
    """
    batch, tokens, _ = metric.shape
    if torch.jit.is_tracing():  # which has tensors for sizes
        batch, tokens = int(batch), int(tokens)
    r = min(r, (tokens - prefix_tokens) // 2)
    if r == 0:
        return match(metric, r, guide, guide_weight, prefix_tokens, mask, None), 0
    real = torch.ones(batch, tokens, dtype=torch.bool, device=metric.device) if mask is None else mask
    matching = match(
        F.pad(metric.detach(), (0, 0, 0, r)),
        r,
        None if guide is None else F.pad(guide.detach(), (0, r)),
        guide_weight,
        prefix_tokens,
        F.pad(real, (0, r)),
        max_merges,
        threshold,
    )
    if batch == 0 or not values_known(metric):
        return matching, r
    matching, padding = _shortened(matching, tokens, prefix_tokens, r)
    if mask is None and padding == 0:
        matching = matching._replace(mask=None, dropped=None)
    return matching, padding


def extended(matching: Matching, padding: int) -> Matching:
    """The same for ``padding`` more rows of padding at the end of input and output."""
    batch, tokens = matching.assignment.shape
    outputs = matching.kept.shape[1]
    rows = torch.arange(padding, device=matching.kept.device).expand(batch, padding)
    return Matching(
        assignment=torch.cat((matching.assignment, rows + outputs), dim=1),
        kept=torch.cat((matching.kept, rows + tokens), dim=1),
        removed=matching.removed,
        mask=None if matching.mask is None else F.pad(matching.mask, (0, padding)),
        dropped=None if matching.dropped is None else F.pad(matching.dropped, (0, padding)),
    )


def _shortened(matching: Matching, tokens: int, prefix_tokens: int, r: int) -> tuple[Matching, int]:
    """Without the padding that no sample needs, at the end of the output and of the input."""
    assignment, kept, removed, mask, dropped = matching
    assert mask is not None
    assert dropped is not None
    merges = (~dropped.gather(1, removed)).sum(1)
    spare = (~mask[:, prefix_tokens:]).sum(1).clamp(max=r)
    fewest, most = (int(count) for count in torch.stack((spare.min(), merges.max())).tolist())
    padding = max(most - fewest, 0)
    rows, outputs = tokens + padding, tokens - fewest
    dropped = (dropped | (assignment >= outputs))[:, :rows]
    kept = kept[:, :outputs].contiguous()
    starts = torch.zeros_like(dropped).scatter_(1, kept, True)
    fate = torch.where(dropped, 0, 1 + starts.to(torch.int64))
    removed = stable_argsort(fate)[:, : rows - outputs].contiguous()
    assignment = assignment[:, :rows].clamp(max=outputs - 1)
    return Matching(assignment, kept, removed, mask[:, :outputs].contiguous(), dropped), padding
