"""Bipartite soft matching, size-weighted merging and size-weighted means in plain PyTorch: the definition of right.

The matching follows "Token Merging: Your ViT But Faster" (Bolya et al., ICLR 2023, section 3): tokens at even
positions are sources, tokens at odd positions are targets, every source proposes its most similar target, and the r
proposals with the highest scores are carried out. A matching is stored as row numbers, never as a matrix, so that
merging reads and writes every row once and the gradient of merging is a gather.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlip_kernels._tracing import stable_argsort


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tokens of ``dtype`` are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Matching(NamedTuple):
    """Which input rows an output of N' = N − r rows is made of. Every input row is either kept or removed."""

    assignment: Tensor
    """``[B, N]`` int64: the output row of every input row."""
    kept: Tensor
    """``[B, N']`` int64: the input row that every output row starts from."""
    removed: Tensor
    """``[B, r]`` int64: the input rows that start no output row: dropped padding, then merged ones, each ascending."""
    mask: Tensor | None
    """``[B, N']`` bool, True where the output row is real; None if every row is."""
    dropped: Tensor | None
    """``[B, N]`` bool, True for masked input rows that found no output row; None if no row was masked."""


def match(
    metric: Tensor,
    r: int,
    *,
    guide: Tensor | None = None,
    guide_weight: float = 1.0,
    prefix_tokens: int = 1,
    mask: Tensor | None = None,
    max_merges: int | None = None,
    threshold: float | None = None,
) -> Matching:
    """Pair the r best sources of ``metric [B, N, D]`` with their targets; see `mlip_kernels.merge_plan`.

    A ``threshold`` forbids pairs as a mask does, so every sample has to have masked tokens enough to drop instead.
    """
    batch, tokens, _ = metric.shape
    r = min(r, max(tokens - prefix_tokens, 0) // 2)
    row = torch.arange(tokens, device=metric.device)
    rows = row.expand(batch, tokens)
    if r == 0:
        rows = rows.contiguous()
        return Matching(rows, rows, rows[:, :0], mask, None if mask is None else torch.zeros_like(mask))

    sources = slice(prefix_tokens + prefix_tokens % 2, None, 2)
    targets = slice(prefix_tokens + 1 - prefix_tokens % 2, None, 2)
    cosine = _cosines(metric, sources, targets, mask)
    if threshold is not None:
        cosine = cosine.masked_fill(cosine < threshold, -torch.inf)
    penalty = None if guide is None or guide_weight == 0 else _penalty(guide[:, sources], guide_weight)
    if max_merges is None or max_merges >= r:
        similarity, best = cosine.max(dim=-1)
        chosen = _best_sources(_scores(similarity, penalty), r)
    else:
        score = _scores(cosine, None if penalty is None else penalty.unsqueeze(-1))
        chosen, best = _best_pairs(score, r, max_merges)

    # A stable sort by what becomes of each row yields the whole output order at once. Nothing is written in place:
    # under `torch.func.vmap` only some of these tensors have the dimension that is mapped over.
    behind = row >= prefix_tokens
    is_source, is_target = behind & (row % 2 == 0), behind & (row % 2 == 1)
    pair = ((row - prefix_tokens) // 2).clamp(0, chosen.shape[1] - 1)
    merges = is_source & chosen[:, pair]
    fate = torch.where(is_target, 2, is_source.to(torch.int64)).expand_as(rows)
    fate = torch.where(merges, 4, fate)
    if mask is not None:
        fate = torch.where(behind & ~mask, 3, fate)
    order = stable_argsort(fate)
    place = stable_argsort(order)
    into = place[:, targets].gather(1, best)
    assignment = torch.where(merges, into[:, pair], place)

    kept, removed = order[:, : tokens - r].contiguous(), order[:, tokens - r :].contiguous()
    if mask is None:
        return Matching(assignment, kept, removed, None, None)
    dropped = assignment >= tokens - r
    return Matching(assignment.clamp(max=tokens - r - 1), kept, removed, mask.gather(1, kept), dropped)


def composed(first: Matching, second: Matching) -> Matching:
    """Both matchings, one after the other, as one."""
    assignment = second.assignment.gather(1, first.assignment)
    kept = first.kept.gather(1, second.kept)
    removed = torch.cat((first.removed, first.kept.gather(1, second.removed)), dim=1).sort(dim=1).values
    dropped = None if second.dropped is None else second.dropped.gather(1, first.assignment)
    if first.dropped is not None:
        dropped = first.dropped if dropped is None else dropped | first.dropped
    if dropped is not None:
        merged = ~dropped.gather(1, removed)
        removed = removed.gather(1, stable_argsort(merged.to(torch.uint8)))
    return Matching(assignment, kept, removed, second.mask, dropped)


def _cosines(metric: Tensor, sources: slice, targets: slice, mask: Tensor | None) -> Tensor:
    """Cosine similarity ``[B, S, T]`` of every source to every target, float32, −inf where no pair is allowed.

    The products are summed in float64 and compared in float32: matrix libraries sum the columns of one product in
    different orders, and only a rounding to fewer bits makes equal tokens tie again on every machine. Float64 is also
    exempt from autocast and from TF32.
    """
    exact = torch.float32 if metric.device.type == "mps" else torch.float64
    if metric.dtype == exact:
        # The squares of huge or tiny values would leave the range; those of a narrower dtype cannot.
        largest = metric.abs().amax(-1, keepdim=True)
        metric = metric / torch.where(largest > 0, largest, 1)
    metric = metric.to(exact)
    norm = torch.linalg.vector_norm(metric, dim=-1, keepdim=True)
    metric = metric / torch.where(norm > 0, norm, 1)
    cosine = torch.matmul(metric[:, sources], metric[:, targets].transpose(1, 2)).float()
    # NaN comes from vectors that are not finite, and from nothing else.
    cosine = cosine.nan_to_num(nan=0.0)
    if mask is not None:
        cosine = cosine.masked_fill(~(mask[:, sources, None] & mask[:, None, targets]), -torch.inf)
    return cosine


def _penalty(guide: Tensor, guide_weight: float) -> Tensor:
    exact = torch.float32 if guide.device.type == "mps" else torch.float64
    return (guide.to(exact) * guide_weight).nan_to_num(nan=torch.finfo(exact).max)


def _scores(similarity: Tensor, penalty: Tensor | None) -> Tensor:
    """``similarity − penalty``; what is −inf, a pair that is not allowed, stays so."""
    if penalty is None:
        return similarity
    return torch.where(similarity == -torch.inf, -torch.inf, similarity.to(penalty.dtype) - penalty)


def _best_sources(score: Tensor, r: int) -> Tensor:
    """``[B, S]`` bool: the r sources with the highest ``score [B, S]``, those at −inf excepted."""
    rank = stable_argsort(stable_argsort(score, descending=True))
    return (rank < r) & (score > -torch.inf)


def _best_pairs(score: Tensor, r: int, max_merges: int) -> tuple[Tensor, Tensor]:
    """r pairs of ``score [B, S, T]``, the best first, as long as their source is free and their target has room.

    Returns the sources that merge, ``[B, S]`` bool, and the target of each, ``[B, S]``.
    """
    batch, sources, targets = score.shape
    from_source, from_target = torch.arange(sources, device=score.device), torch.arange(targets, device=score.device)
    chosen = torch.zeros(batch, sources, dtype=torch.bool, device=score.device)
    best = torch.zeros(batch, sources, dtype=torch.int64, device=score.device)
    room = torch.full((batch, targets), max_merges, device=score.device)
    for _ in range(r):
        highest, pair = score.flatten(1).max(dim=1, keepdim=True)
        allowed = highest > -torch.inf
        source, target = pair // targets, pair % targets
        now = allowed & (from_source == source)
        chosen = chosen | now
        best = torch.where(now, target, best)
        room = room - (allowed & (from_target == target)).to(room.dtype)
        score = score.masked_fill(chosen.unsqueeze(2) | (room == 0).unsqueeze(1), -torch.inf)
    return chosen, best


def merge(x: Tensor, size: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of the rows of ``x [B, N, C]`` that share an output row, and the sizes ``[B, N']``."""
    merged_size, weight = merged_sizes(size, matching, accumulation_dtype(x.dtype))
    return combine(x, weight, matching), merged_size


def unmerge(y: Tensor, matching: Matching) -> Tensor:
    """Copy of its output row of ``y [B, N', C]`` for every input row, 0 for dropped ones: ``[B, N, C]``."""
    return spread(y, None, matching)


def merged_sizes(size: Tensor, matching: Matching, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sizes ``[B, N']`` after merging, and in ``dtype`` the weight ``[B, N]`` of every input row in its output row.

    Rows that are masked count 0. An output row of size 0 is the row it starts from, unchanged.
    """
    kept = size.gather(1, matching.kept)
    removed = size.gather(1, matching.removed)
    if matching.mask is not None:
        kept = kept.masked_fill(~matching.mask, 0)
    if matching.dropped is not None:
        removed = removed.masked_fill(matching.dropped.gather(1, matching.removed), 0)
    destination = matching.assignment.gather(1, matching.removed)
    batch, merged_tokens = kept.shape
    total = _add_rows(kept.reshape(-1, 1), flat_rows(destination, merged_tokens), removed.reshape(-1, 1))
    total = total.view(batch, merged_tokens)
    divisor = torch.where(total > 0, total, 1).to(dtype)
    kept_weight = torch.where(total > 0, kept / divisor, 1)
    counted = size if matching.dropped is None else size.masked_fill(matching.dropped, 0)
    starts = matching.kept.gather(1, matching.assignment) == torch.arange(size.shape[1], device=size.device)
    merged_weight = counted / divisor.gather(1, matching.assignment)
    return total, torch.where(starts, kept_weight.gather(1, matching.assignment), merged_weight)


def combine(x: Tensor, weight: Tensor | None, matching: Matching) -> Tensor:
    """Sum the rows of ``x [B, N, C]`` that share an output row, times ``weight [B, N]``: ``[B, N', C]``.

    Half precision is summed in float32. The terms of a row are added in a fixed order: the row it starts from, then
    the others ascending.
    """
    batch, tokens, channels = x.shape
    merged_tokens = matching.kept.shape[1]
    rows = x.reshape(batch * tokens, channels)
    accumulate = accumulation_dtype(x.dtype)
    kept_rows, removed_rows = flat_rows(matching.kept, tokens), flat_rows(matching.removed, tokens)
    total = rows.index_select(0, kept_rows).to(accumulate)
    part = rows.index_select(0, removed_rows).to(accumulate)
    if weight is not None:
        weight = weight.to(accumulate).reshape(-1, 1)
        total = total * weight.index_select(0, kept_rows)
        part = part * weight.index_select(0, removed_rows)
    if matching.dropped is not None:
        # Padding may hold NaN, which a weight of 0 would not remove.
        part = part.masked_fill(matching.dropped.gather(1, matching.removed).reshape(-1, 1), 0)
    destination = flat_rows(matching.assignment.gather(1, matching.removed), merged_tokens)
    return _add_rows(total, destination, part).to(x.dtype).view(batch, merged_tokens, channels)


def spread(y: Tensor, weight: Tensor | None, matching: Matching) -> Tensor:
    """Copy to every input row its output row of ``y [B, N', C]``, times ``weight [B, N]``: ``[B, N, C]``.

    The transpose of `combine`, so each is the gradient of the other.
    """
    batch, merged_tokens, channels = y.shape
    assignment = matching.assignment
    rows = y.reshape(batch * merged_tokens, channels).index_select(0, flat_rows(assignment, merged_tokens))
    if weight is not None:
        accumulate = accumulation_dtype(y.dtype)
        rows = (rows.to(accumulate) * weight.to(accumulate).reshape(-1, 1)).to(y.dtype)
    if matching.dropped is not None:
        rows = rows.masked_fill(matching.dropped.reshape(-1, 1), 0)
    return rows.view(batch, assignment.shape[1], channels)


def flat_rows(rows: Tensor, tokens: int) -> Tensor:
    """Row numbers ``[B, K]`` within samples of ``tokens`` rows as row numbers of the flattened batch."""
    start = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1) * tokens
    return (rows + start).reshape(-1)


def _add_rows(total: Tensor, destination: Tensor, part: Tensor) -> Tensor:
    """Add every row of ``part`` to its row of ``total``, in order."""
    if total.is_cuda:
        # index_add uses atomics there, whose order varies; index_put sorts first.
        return total.index_put((destination,), part, accumulate=True)
    return total.index_add(0, destination, part)


def weighted_mean(x: Tensor, weight: Tensor | None = None, *, prefix_tokens: int = 0) -> Tensor:
    """``sum_n w_bn x_bn / sum_n w_bn`` over the tokens behind the prefix; differentiable in ``x`` and ``weight``."""
    return weighted_mean_and_total(x, weight, prefix_tokens)[0]


def weighted_mean_and_total(x: Tensor, weight: Tensor | None, prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """The mean ``[B, D]`` in the dtype of ``x`` and the total weight ``[B]`` in the accumulation dtype."""
    accumulate = accumulation_dtype(x.dtype)
    tokens = x[:, prefix_tokens:].to(accumulate)
    if weight is None:
        total = tokens.new_full((tokens.shape[0],), tokens.shape[1])
        weighted = tokens.sum(1)
    else:
        weight = weight[:, prefix_tokens:].to(accumulate)
        tokens = _without_unused(tokens, weight)
        total = weight.sum(1)
        weighted = (tokens * weight[:, :, None]).sum(1)
    empty = (total == 0)[:, None]
    mean = (weighted / total[:, None].masked_fill(empty, 1)).masked_fill(empty, 0)
    return mean.to(x.dtype).contiguous(), total


def weighted_mean_backward(
    grad: Tensor, weight: Tensor | None, total: Tensor, tokens: int, prefix_tokens: int
) -> Tensor:
    """``dx_bn = w_bn / W_b g_b``, 0 for prefix tokens and where the total weight ``W_b`` is 0."""
    batch, channels = grad.shape
    normalized = _normalized_weight(weight, total, tokens, prefix_tokens)
    grad_x = grad.new_zeros(batch, tokens, channels)
    grad_x[:, prefix_tokens:] = normalized[:, :, None] * grad[:, None, :].to(total.dtype)
    return grad_x


def weighted_mean_backward_weight(grad: Tensor, x: Tensor, weight: Tensor, total: Tensor, prefix_tokens: int) -> Tensor:
    """``dw_bn = <g_b, x_bn - y_b> / W_b``, with ``<g_b, y_b> = sum_n w_bn <g_b, x_bn> / W_b``, so y is not needed."""
    normalized = _normalized_weight(weight, total, x.shape[1], prefix_tokens)
    weight = weight[:, prefix_tokens:]
    tokens = _without_unused(x[:, prefix_tokens:].to(total.dtype), weight)
    products = (tokens * grad[:, None, :].to(total.dtype)).sum(2)
    centred = products - (normalized * products).sum(1, keepdim=True)
    empty = (total == 0)[:, None]
    grad_weight = total.new_zeros(x.shape[0], x.shape[1])
    grad_weight[:, prefix_tokens:] = (centred / total[:, None].masked_fill(empty, 1)).masked_fill(empty, 0)
    return grad_weight


def _normalized_weight(weight: Tensor | None, total: Tensor, tokens: int, prefix_tokens: int) -> Tensor:
    """``w_bn / W_b`` of the tokens behind the prefix, 0 where the total is 0."""
    empty = (total == 0)[:, None]
    safe = total[:, None].masked_fill(empty, 1)
    counted = total.new_ones(1, tokens - prefix_tokens) if weight is None else weight[:, prefix_tokens:]
    return (counted / safe).masked_fill(empty, 0)


def _without_unused(tokens: Tensor, weight: Tensor) -> Tensor:
    """Tokens whose non-finite values count as 0 where the weight is 0: what padding holds must not matter."""
    return tokens.masked_fill((weight == 0)[:, :, None] & ~tokens.isfinite(), 0)
