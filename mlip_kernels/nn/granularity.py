"""Three-way merging: informative tokens stay, middling ones merge two to one, the rest four to one.

In the spirit of three-way decisions for multi-granularity vision transformers (Zhang et al., "MG-ViT", NeurIPS 2023).
The shares fix the compression rate exactly: α + β/2 + (1 − α − β)/4 of the tokens are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlip_kernels._arguments import (
    check_integer,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
    check_tokens,
    sequence_of,
    shown,
)
from mlip_kernels._tracing import stable_argsort
from mlip_kernels.merging import MergePlan, merge_plan
from mlip_kernels.merging.plan import check_size


def three_way_plan(
    metric: Tensor, guide: Tensor, shares: tuple[float, float], *, prefix_tokens: int = 1, size: Tensor | None = None
) -> MergePlan:
    """Sort tokens by ``guide`` into three groups and merge within the lower two.

    Args:
        metric: ``[B, N, C]``; within a group, the most similar tokens merge (`merge_plan`).
        guide: ``[B, N]``, higher for more informative; entries of prefix tokens are not read.
        shares: α of the tokens stay and β merge two to one; the others merge four to one, in two rounds.
        prefix_tokens: leading tokens that stay.
        size: ``[B, N]`` sizes, the default of `MergePlan.merge`; the second round weighs its means by them.

    Returns:
        A plan whose output order is: prefix tokens, tokens that stay in ascending order, then the merged groups.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range: shares are negative or
            exceed 1 together, ``prefix_tokens`` is not in [0, N].
    """
    check_tokens("metric", metric)
    batch, tokens, _ = metric.shape
    check_shape("guide", check_tensor("guide", guide, layout="[B, N]"), (batch, tokens), "[B, N]")
    check_same_device("guide", guide, "metric", metric)
    stay_share, pair_share = check_shares("shares", shares)
    prefix_tokens = check_integer("prefix_tokens", prefix_tokens, minimum=0, maximum=tokens)
    if size is not None:
        check_size(size, (batch, tokens), "metric", metric)
        size = size.to(torch.float32)
    patches = tokens - prefix_tokens
    stay = round(stay_share * patches)
    pairs = min(round(pair_share * patches), patches - stay)

    with torch.no_grad():
        order = stable_argsort(guide[:, prefix_tokens:], descending=True) + prefix_tokens
        prefix = torch.arange(prefix_tokens, device=metric.device).expand(batch, -1)
        assignment = torch.empty_like(guide, dtype=torch.int64, memory_format=torch.contiguous_format)
        kept: list[Tensor] = []
        filled = 0
        groups = (
            (prefix, 0),
            (order[:, :stay], 0),
            (order[:, stay : stay + pairs], 1),
            (order[:, stay + pairs :], 2),
        )
        for rows, rounds in groups:
            rows = rows.sort(dim=1).values
            into, starts = _halved(metric, size, rows, rounds)
            assignment.scatter_(1, rows, into + filled)
            kept.append(rows.gather(1, starts))
            filled += starts.shape[1]
        start = torch.cat(kept, dim=1)
        is_start = torch.zeros_like(assignment, dtype=torch.bool).scatter_(1, start, True)
        removed = stable_argsort(is_start.to(torch.int8))[:, : tokens - filled].contiguous()
    return MergePlan._made(assignment, start, removed, prefix_tokens, size=size)


def check_shares(name: str, shares: object) -> tuple[float, float]:
    """Return the shares of `three_way_plan` if they are two numbers, at least 0, with a sum of at most 1."""
    pair = sequence_of(shares)
    if pair is None or len(pair) != 2:
        raise TypeError(f"{name}: expected a pair of shares, got {shown(shares)}")
    stay = check_number(f"{name}[0]", pair[0], minimum=0.0, maximum=1.0)
    merge = check_number(f"{name}[1]", pair[1], minimum=0.0, maximum=1.0)
    if stay + merge > 1:
        raise ValueError(f"{name}: expected two shares with sum <= 1, got {stay}, {merge}")
    return stay, merge


def _halved(metric: Tensor, size: Tensor | None, rows: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Halve the tokens in ``rows [B, G]`` by matching, ``rounds`` times.

    Returns the output token ``[B, G]`` of each of them, and the place in ``rows`` ``[B, G']`` each output starts from.
    """
    count = rows.shape[1]
    into = starts = torch.arange(count, device=rows.device).expand(rows.shape[0], -1)
    if count == 0:
        return into, starts
    part = metric.gather(1, rows[..., None].expand(-1, -1, metric.shape[2]))
    sizes = None if size is None else size.gather(1, rows)
    for _ in range(rounds):
        plan = merge_plan(part, part.shape[1] // 2, size=sizes, prefix_tokens=0)
        part, sizes = plan.merge(part)
        into, starts = plan.track(into), starts.gather(1, plan.kept)
    return into, starts
