"""Bipartite matching of tokens: every token at an even position proposes to merge into the token at an odd position
with the highest cosine, and the r best proposals are carried out. S sources, T targets, S, T ~ N / 2, vectors of D.

    metric [B, N, D] float32, float16 or bfloat16     guide [B, N] floating     mask [B, N] boolean

    kernel           reads                                        writes                            flops
    match            B N D metric, the guide, the mask            some 30 B N bytes of index maps   2 B S T D
    similarities     the same, for N > 1024                       12 B S bytes of proposals         2 B S T D
    maps             12 B S bytes of proposals, the mask          some 30 B N bytes of index maps   0

Counted as often as they are loaded, targets are read S / 64 times, and twice a vector for every pair that is compared
exactly; all but the first time from a cache. Bound by the tensor cores from D ~ 50 on. The S T similarities never leave
the registers.

`match` has one program for each sample, `similarities` one for each 64 sources of a sample. A tile of similarities has
ROWS sources and COLUMNS targets. The tensor cores add products in no promised order and round towards zero. So a tile
only selects candidates, by a bound on its error (`margin`), and the candidates are compared as the definition says: by
cosines summed in float64 and rounded to float32. In each step every source of the tile compares one more candidate, the
lowest first: one or two steps where vectors differ, COLUMNS where all are alike. float32 vectors are split into two
bfloat16 parts, of whose products three are computed; the margin covers the fourth. Vectors whose squares could leave
the range of float32 are always compared exactly.

The proposals of a sample become index maps in three stages, each behind a barrier, since a stage reads what other
threads of the one before wrote. All is integers, so no order of additions matters:

    partners      the row that each source merges into: its best target if fewer than r sources come before it, by score
                  and then by position, which S^2 comparisons count; else -1
    positions     of all rows: prefix, unmerged sources, targets, padding, merged sources, each ascending; rows beyond
                  the N - r output rows are removed
    assignment    of merged sources: that of their target
"""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.triton import contiguous, with_unit_stride

LARGEST_SAMPLE = 1024  # tokens of a sample that one program takes
ROWS = 64  # sources of a tile
COLUMNS = 64  # targets of a tile
BLOCK_D = 32  # elements of their rows; half as many where products take two parts of each
EXACT_D = 16  # elements of a row that are multiplied in float64 at a time
RANKED = tl.constexpr(64)  # sources whose rank is counted
AGAINST = tl.constexpr(64)  # sources that they are compared with at a time
CHUNK = tl.constexpr(1024)  # rows whose positions are found at a time
NUM_WARPS = 8
NOT_SPECIALIZED = ("N", "r", "prefix", "guide_weight")  # or each value could compile the kernel anew


class Tile(NamedTuple):
    """What the kernels are compiled for; ``WIDE``: whether offsets inside a sample take 64 bits."""

    ROWS: int
    COLUMNS: int
    BLOCK_D: int
    EXACT_D: int
    WIDE: bool


@triton.jit
def _product(left, right, sums):
    """``sums + left @ right``; for float32 with an error of at most 2^-16 |left| |right| beside that of the sum."""
    if left.dtype == tl.float32:
        high, other_high = left.to(tl.bfloat16), right.to(tl.bfloat16)
        low = (left - high.to(tl.float32)).to(tl.bfloat16)
        other_low = (right - other_high.to(tl.float32)).to(tl.bfloat16)
        sums = tl.dot(low, other_high, sums)
        sums = tl.dot(high, other_low, sums)
        sums = tl.dot(high, other_high, sums)
    else:
        sums = tl.dot(left, right, sums)
    return sums


@triton.jit
def _ordinary(largest):
    """Whether squares of vectors with this ``largest`` element are far from both ends of the range of float32."""
    return (largest > 2.0**-40) & (largest < 2.0**40)


@triton.jit
def _directed(largest):
    """Whether vectors with this ``largest`` element have a direction: they are finite and not zero."""
    return (largest > 0) & (largest < float("inf"))


@triton.jit
def _magnitude(values):
    """Absolute values, infinite for NaN."""
    values = tl.abs(values.to(tl.float32))
    return tl.where(values == values, values, float("inf"))


@triton.jit
def _exact_cosines(metric, n, m, mask, D, stride_token, ROWS: tl.constexpr, EXACT_D: tl.constexpr):
    """Cosines ``[ROWS]`` of rows ``n`` and ``m [ROWS]``, summed in float64 and rounded to float32; 0 where one of them
    has no direction. Squares of float32 stay within the range of float64."""
    product = tl.zeros((ROWS, EXACT_D), tl.float64)
    square = tl.zeros((ROWS, EXACT_D), tl.float64)
    other_square = tl.zeros((ROWS, EXACT_D), tl.float64)
    for first in tl.range(0, D, EXACT_D, disable_licm=True):
        d = first + tl.arange(0, EXACT_D)
        used = mask[:, None] & (d < D)[None, :]
        at = n[:, None] * stride_token + d[None, :]
        other = m[:, None] * stride_token + d[None, :]
        a = tl.load(metric + at, mask=used, other=0.0).to(tl.float32).to(tl.float64)
        b = tl.load(metric + other, mask=used, other=0.0).to(tl.float32).to(tl.float64)
        product += a * b
        square += a * a
        other_square += b * b
    norms = tl.sqrt(tl.sum(square, 1)) * tl.sqrt(tl.sum(other_square, 1))
    directed = (norms > 0) & (norms < float("inf"))
    return tl.where(directed, tl.sum(product, 1) / tl.where(directed, norms, 1.0), 0.0).to(tl.float32)


@triton.jit
def _keys(similarity, guide, n, N, guide_weight):
    """Integers in the order of the scores; those of sources without a target are the lowest."""
    score = similarity.to(tl.float64)
    if guide is not None:
        largest = 1.7976931348623157e308
        weight = guide_weight.to(tl.int64).to(tl.float64, bitcast=True)
        penalty = tl.load(guide + n, mask=n < N, other=0.0).to(tl.float64) * weight
        penalty = tl.where(penalty == penalty, penalty, largest)
        score -= tl.where(penalty > largest, largest, tl.where(penalty < -largest, -largest, penalty))
    score += 0.0  # the zeros of both signs tie
    bits = score.to(tl.int64, bitcast=True)
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


@triton.jit
def _store_proposals(
    metric,  # [N, D]; this and the next ones of one sample
    guide,  # [N], or None
    mask,  # [N], or None
    keys,  # [S]
    best,  # [S]
    first,
    N,
    D,
    S,
    prefix,
    stride_token,
    guide_weight,
    margin,
    TILE: tl.constexpr,
):
    """Best target of sources [first, first + ROWS), as its row, -1 where there is none, and the key of the proposal."""
    n = prefix + prefix % 2 + 2 * (first + tl.arange(0, TILE.ROWS))
    if TILE.WIDE:
        n = n.to(tl.int64)
    real = n < N
    if mask is not None:
        real = real & (tl.load(mask + n, mask=real, other=0) != 0)
    highest = tl.full((TILE.ROWS,), float("-inf"), tl.float32)  # of what the tensor cores found
    best_target = tl.full((TILE.ROWS,), -1, tl.int32)
    similarity = tl.full((TILE.ROWS,), float("-inf"), tl.float32)
    for first_target in tl.range(prefix + 1 - prefix % 2, N, 2 * TILE.COLUMNS, disable_licm=True):
        m = first_target + 2 * tl.arange(0, TILE.COLUMNS)
        if TILE.WIDE:
            m = m.to(tl.int64)
        target = m < N
        if mask is not None:
            target = target & (tl.load(mask + m, mask=target, other=0) != 0)

        product = tl.zeros((TILE.ROWS, TILE.COLUMNS), tl.float32)
        squares, largest = tl.zeros((TILE.ROWS, TILE.BLOCK_D), tl.float32), tl.zeros((TILE.ROWS,), tl.float32)
        target_squares = tl.zeros((TILE.BLOCK_D, TILE.COLUMNS), tl.float32)
        target_largest = tl.zeros((TILE.COLUMNS,), tl.float32)
        for first_element in tl.range(0, D, TILE.BLOCK_D, disable_licm=True):
            d = first_element + tl.arange(0, TILE.BLOCK_D)
            at = n[:, None] * stride_token + d[None, :]
            left = tl.load(metric + at, mask=real[:, None] & (d < D)[None, :], other=0.0)
            at = m[None, :] * stride_token + d[:, None]
            right = tl.load(metric + at, mask=target[None, :] & (d < D)[:, None], other=0.0)
            product = _product(left, right, product)
            squares += left.to(tl.float32) * left.to(tl.float32)
            target_squares += right.to(tl.float32) * right.to(tl.float32)
            largest = tl.maximum(largest, tl.max(_magnitude(left), 1))
            target_largest = tl.maximum(target_largest, tl.max(_magnitude(right), 0))

        square, target_square = tl.sum(squares, 1), tl.sum(target_squares, 0)
        allowed = real[:, None] & target[None, :]
        directed = _directed(largest)
        zero = ~directed[:, None] | ~_directed(target_largest)[None, :]
        known = zero | (_ordinary(largest)[:, None] & _ordinary(target_largest)[None, :])
        cosine = product * tl.where(square > 0, tl.rsqrt(square), 0.0)[:, None]
        cosine *= tl.where(target_square > 0, tl.rsqrt(target_square), 0.0)[None, :]
        cosine = tl.where(zero, 0.0, cosine)
        highest = tl.maximum(highest, tl.max(tl.where(allowed & known, cosine, float("-inf")), 1))
        candidate = allowed & (~known | (cosine >= highest[:, None] - margin))

        column = tl.arange(0, TILE.COLUMNS)[None, :]
        candidate_column = tl.min(tl.where(candidate, column, TILE.COLUMNS), 1)
        while tl.min(candidate_column, 0) < TILE.COLUMNS:
            more = candidate_column < TILE.COLUMNS
            other = first_target + 2 * candidate_column
            exact = _exact_cosines(metric, n, other.to(n.dtype), more, D, stride_token, TILE.ROWS, TILE.EXACT_D)
            better = more & (exact > similarity)
            similarity = tl.where(better, exact, similarity)
            best_target = tl.where(better, other, best_target)
            # A source without a direction has cosine 0 with all others: the first one is the best.
            remaining = candidate & (column > candidate_column[:, None]) & directed[:, None]
            candidate_column = tl.min(tl.where(remaining, column, TILE.COLUMNS), 1)

    s = first + tl.arange(0, TILE.ROWS)
    key = _keys(similarity, guide, prefix + prefix % 2 + 2 * s, N, guide_weight)
    tl.store(keys + s, key, mask=s < S)
    tl.store(best + s, best_target, mask=s < S)


@triton.jit
def _store_partners(keys, best, partner, S, r):
    for first in range(0, S, RANKED):
        s = first + tl.arange(0, RANKED)
        key = tl.load(keys + s, mask=s < S, other=0)
        before = tl.zeros((RANKED,), tl.int32)
        for first_other in range(0, S, AGAINST):
            other = first_other + tl.arange(0, AGAINST)
            other_key = tl.load(keys + other, mask=other < S, other=0)[None, :]
            earlier = (other_key > key[:, None]) | ((other_key == key[:, None]) & (other[None, :] < s[:, None]))
            before += tl.sum((earlier & (other < S)[None, :]).to(tl.int32), 1)
        target = tl.load(best + s, mask=s < S, other=-1)
        tl.store(partner + s, tl.where(before < r, target, -1), mask=s < S)


@triton.jit
def _fates(partner, mask, first, N, prefix):
    """Rows [first, first + CHUNK), whether they are real, and their fates: an unmerged source, a target, padding, a
    merged source. Each fate has 16 of 64 bits, from ``bits`` on; the last result has a one there, to be summed."""
    n = first + tl.arange(0, CHUNK)
    in_bounds = n < N
    real = in_bounds
    if mask is not None:
        real = tl.load(mask + n, mask=in_bounds, other=0) != 0
    behind = in_bounds & (n >= prefix)
    source = behind & real & (n % 2 == 0)
    merged = tl.load(partner + (n - prefix - prefix % 2) // 2, mask=source, other=-1) >= 0
    bits = tl.where(n % 2 == 0, tl.where(merged, 48, 0), 16)
    bits = tl.where(real, bits, 32)
    one = tl.full((CHUNK,), 1, tl.int64)
    return n, real, bits, tl.where(behind, one << bits.to(tl.int64), 0)


@triton.jit
def _field(counts, number: tl.constexpr):
    return ((counts >> (16 * number)) & 0xFFFF).to(tl.int32)


@triton.jit
def _store_positions(partner, mask, assignment, kept, removed, merged_mask, dropped, N, r, prefix):
    unmerged, targets, padding = 0, 0, 0
    for first in range(0, N, CHUNK):
        _, _, _, ones = _fates(partner, mask, first, N, prefix)
        counts = tl.sum(ones, 0)
        unmerged += _field(counts, 0)
        targets += _field(counts, 1)
        padding += _field(counts, 2)
    next_unmerged = prefix
    next_target = prefix + unmerged
    next_padding = next_target + targets
    next_merged = next_padding + padding
    outputs = N - r
    for first in range(0, N, CHUNK):
        n, real, bits, ones = _fates(partner, mask, first, N, prefix)
        counts = tl.cumsum(ones, 0) - ones
        position = tl.where(bits == 0, next_unmerged + _field(counts, 0), next_target + _field(counts, 1))
        position = tl.where(bits == 32, next_padding + _field(counts, 2), position)
        position = tl.where(bits == 48, next_merged + _field(counts, 3), position)
        position = tl.where(n < prefix, n, position)
        in_bounds = n < N
        beyond = position >= outputs
        tl.store(kept + position, n.to(tl.int64), mask=in_bounds & ~beyond)
        tl.store(removed + (position - outputs), n.to(tl.int64), mask=in_bounds & beyond)
        merged = (n >= prefix) & (bits == 48)
        tl.store(assignment + n, tl.minimum(position, outputs - 1).to(tl.int64), mask=in_bounds & ~merged)
        if mask is not None:
            tl.store(merged_mask + position, real, mask=in_bounds & ~beyond)
            tl.store(dropped + n, beyond & ~merged, mask=in_bounds)
        total = tl.sum(ones, 0)
        next_unmerged += _field(total, 0)
        next_target += _field(total, 1)
        next_padding += _field(total, 2)
        next_merged += _field(total, 3)


@triton.jit
def _store_index_maps(b, keys, best, partner, mask, assignment, kept, removed, merged_mask, dropped, N, S, r, prefix):
    """Index maps of sample ``b`` from its proposals. ``mask`` points to that sample, everything else to the first."""
    keys += b * S
    best += b * S
    partner += b * S
    assignment += b * N
    if mask is not None:
        merged_mask += b * (N - r)
        dropped += b * N
    _store_partners(keys, best, partner, S, r)
    tl.debug_barrier()
    _store_positions(partner, mask, assignment, kept + b * (N - r), removed + b * r, merged_mask, dropped, N, r, prefix)
    tl.debug_barrier()
    for first in range(0, S, CHUNK):
        s = first + tl.arange(0, CHUNK)
        target = tl.load(partner + s, mask=s < S, other=-1)
        merged = target >= 0
        position = tl.load(assignment + target, mask=merged, other=0)
        tl.store(assignment + (prefix + prefix % 2 + 2 * s), position, mask=merged)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def merging_match_kernel(
    metric,  # [B, N, D], unit stride in D
    guide,  # [B, N], or None
    mask,  # [B, N] bytes, or None
    keys,  # workspace [B, S] int64
    best,  # workspace [B, S] int32
    partner,  # workspace [B, S] int32
    assignment,  # [B, N]
    kept,  # [B, N - r]
    removed,  # [B, r]
    merged_mask,  # [B, N - r] bytes, or None
    dropped,  # [B, N] bytes, or None
    N,
    D,
    r,
    prefix,
    stride_batch,
    stride_token,
    guide_weight,  # the bits of a float64
    margin,
    TILE: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    S = (N - prefix - prefix % 2 + 1) // 2
    if mask is not None:
        mask += b * N
    if guide is not None:
        guide += b * N
    for first in tl.range(0, S, TILE.ROWS, disable_licm=True):
        _store_proposals(
            metric + b * stride_batch, guide, mask, keys + b * S, best + b * S, first,
            N, D, S, prefix, stride_token, guide_weight, margin, TILE,
        )  # fmt: skip
    tl.debug_barrier()  # all warps have stored their proposals
    _store_index_maps(b, keys, best, partner, mask, assignment, kept, removed, merged_mask, dropped, N, S, r, prefix)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def merging_match_similarities_kernel(
    metric,
    guide,
    mask,
    keys,
    best,
    N,
    D,
    prefix,
    stride_batch,
    stride_token,
    guide_weight,
    margin,
    TILE: tl.constexpr,
):
    S = (N - prefix - prefix % 2 + 1) // 2
    groups = tl.cdiv(S, TILE.ROWS)
    b = (tl.program_id(0) // groups).to(tl.int64)
    if mask is not None:
        mask += b * N
    if guide is not None:
        guide += b * N
    _store_proposals(
        metric + b * stride_batch, guide, mask, keys + b * S, best + b * S, tl.program_id(0) % groups * TILE.ROWS,
        N, D, S, prefix, stride_token, guide_weight, margin, TILE,
    )  # fmt: skip


@triton.jit(do_not_specialize=("N", "r", "prefix"))
def merging_match_maps_kernel(mask, keys, best, partner, assignment, kept, removed, merged_mask, dropped, N, r, prefix):
    b = tl.program_id(0).to(tl.int64)
    if mask is not None:
        mask += b * N
    S = (N - prefix - prefix % 2 + 1) // 2
    _store_index_maps(b, keys, best, partner, mask, assignment, kept, removed, merged_mask, dropped, N, S, r, prefix)


def margin(dtype: torch.dtype, width: int) -> float:
    """By how much two cosines from the tensor cores may differ where the exact ones tie or are in the other order.

    A sum of ``width`` products of unit vectors loses at most 2^-22 for each of them, since the tensor cores align the
    terms and truncate them; 64 more cover the lengths and the scaling by them. float32 loses what `_product` leaves
    out. The last term is the rounding of the exact cosines to float32.
    """
    lost = (width + 64) * 2.0**-22 + (2.0**-16 if dtype == torch.float32 else 0.0)
    return 2 * lost + 2.0**-23


def match(
    metric: Tensor, r: int, guide: Tensor | None, guide_weight: float, prefix_tokens: int, mask: Tensor | None
) -> tuple[Tensor, ...]:
    """``mlip_kernels::merging_match`` on CUDA tensors. Takes ``16·B·S`` bytes of memory during the call."""
    batch, tokens, width = metric.shape
    if not 1 <= r <= (tokens - prefix_tokens) // 2 or prefix_tokens < 0:
        raise RuntimeError(f"r: expected 1 <= r <= (N - prefix_tokens) / 2, got {r} of {tokens}, {prefix_tokens}")
    sources = (tokens - prefix_tokens - prefix_tokens % 2 + 1) // 2
    create = functools.partial(metric.new_empty, batch)
    rows, flags = (tokens, tokens - r, r), (0, 0) if mask is None else (tokens - r, tokens)
    maps = *(create(n, dtype=torch.int64) for n in rows), *(create(n, dtype=torch.bool) for n in flags)
    if batch == 0:
        return maps
    metric = with_unit_stride(metric)
    guide, mask = contiguous(guide, mask)
    keys, best, partner = (create(sources, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.int32))
    workspace, written = (keys, best, partner), (*maps[:3], None, None) if mask is None else maps
    scoring = (
        metric.stride(0),
        metric.stride(1),
        struct.unpack("<q", struct.pack("<d", guide_weight))[0],
        margin(metric.dtype, width),
    )
    block_d = BLOCK_D // 2 if metric.dtype == torch.float32 else BLOCK_D
    tile = {
        "TILE": Tile(ROWS, COLUMNS, block_d, EXACT_D, WIDE=tokens * metric.stride(1) + width >= 2**31),
        "num_warps": NUM_WARPS,
        "maxnreg": 255,
        "num_stages": 1,  # copies ahead run into the products on sm_90, since lengths read the same tile (Triton 3.8)
    }
    if tokens <= LARGEST_SAMPLE:
        merging_match_kernel[(batch,)](
            metric, guide, mask, *workspace, *written, tokens, width, r, prefix_tokens, *scoring, **tile
        )
        return maps
    merging_match_similarities_kernel[(batch * triton.cdiv(sources, ROWS),)](
        metric, guide, mask, *workspace[:2], tokens, width, prefix_tokens, *scoring, **tile
    )
    merging_match_maps_kernel[(batch,)](mask, *workspace, *written, tokens, r, prefix_tokens, num_warps=NUM_WARPS)
    return maps
