"""Matchings that leave unlike tokens apart, so that every sample merges as many as are alike.

A matching removes the same number of rows from every sample. Samples that merge fewer tokens than others drop padding
instead, which the input is given for this: masked rows behind the last token, as few as the batch needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_kernels._arguments import values_known
from mlip_kernels._tracing import stable_argsort
from mlip_kernels.merging.match import match
from mlip_kernels.merging.plain import Matching


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
