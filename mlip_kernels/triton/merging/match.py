"""Bipartite matching of tokens: every token at an even position proposes to merge into the token at an odd position
with the highest cosine, and the r best proposals are carried out. S sources, T targets, S, T ~ N / 2, vectors of D.

    metric [B, N, D] float32, float16 or bfloat16     guide [B, N] floating     mask [B, N] boolean

    kernel           reads                                        writes                            flops
    match            B N D metric, the guide, the mask            some 30 B N bytes of maps         2 B S T D
    similarities     the same, for N > 1024                       12 B S bytes of proposals         2 B S T D
    maps             12 B S bytes of proposals, the mask          some 30 B N bytes of maps         0

Counted as often as they are asked for, targets are read S / 64 times, and twice a vector for every pair that is looked
at again; all but the first time from a cache. Bound by the tensor cores from D ~ 50 on. The S T similarities never
leave the registers.

`match` has one program for each sample, `similarities` one for each 64 sources of a sample. A tile of similarities has
ROWS sources and COLUMNS targets. Its products have no promised order, and the tensor cores round towards zero. So they
only tell which targets may be the best, by a bound on their error (`margin`), and those few are compared by what the
definition says: a cosine summed in float64 and rounded to float32. In each step every source of the tile looks at one
more target, the lowest first, until none has one left: one or two steps where vectors differ, COLUMNS where all are
alike. float32 vectors are split into two parts in bfloat16, and of their products three remain; what is lost is in the
margin. Vectors whose squares could leave the range of float32 are always compared exactly.

What is chosen passes through a workspace in memory from one stage of a program to the next: maps.py.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.triton.layouts import with_unit_stride
from mlip_kernels.triton.merging.maps import write_maps

LARGEST_SAMPLE = 1024  # tokens of a sample that one program takes
ROWS = 64  # sources of a tile
COLUMNS = 64  # targets of a tile
BLOCK_D = 32  # elements of their rows; half as many where products take two parts of each
EXACT_D = 16  # elements of a row that are multiplied in float64 at a time
NUM_WARPS = 8
NOT_SPECIALIZED = ("N", "r", "prefix", "guide_weight")  # or each value could compile the kernel anew


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
def _propose(
    metric,  # [N, D] of one sample
    mask,  # [N], or None
    first,  # source
    N,
    D,
    prefix,
    stride_token,
    margin,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT_D: tl.constexpr,
    WIDE: tl.constexpr,  # whether offsets inside a sample take 64 bits
):
    """Best target of sources [first, first + ROWS), as its row, and the cosine of the two; -1 where there is none."""
    n = prefix + prefix % 2 + 2 * (first + tl.arange(0, ROWS))
    if WIDE:
        n = n.to(tl.int64)
    real = n < N
    if mask is not None:
        real = real & (tl.load(mask + n, mask=real, other=0) != 0)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)  # of what the tensor cores found
    best = tl.full((ROWS,), -1, tl.int32)
    similarity = tl.full((ROWS,), float("-inf"), tl.float32)
    for first_target in tl.range(prefix + 1 - prefix % 2, N, 2 * COLUMNS, disable_licm=True):
        m = first_target + 2 * tl.arange(0, COLUMNS)
        if WIDE:
            m = m.to(tl.int64)
        target = m < N
        if mask is not None:
            target = target & (tl.load(mask + m, mask=target, other=0) != 0)

        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        squares, largest = tl.zeros((ROWS, BLOCK_D), tl.float32), tl.zeros((ROWS,), tl.float32)
        target_squares, target_largest = tl.zeros((BLOCK_D, COLUMNS), tl.float32), tl.zeros((COLUMNS,), tl.float32)
        for first_element in tl.range(0, D, BLOCK_D, disable_licm=True):
            d = first_element + tl.arange(0, BLOCK_D)
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

        column = tl.arange(0, COLUMNS)[None, :]
        place = tl.min(tl.where(candidate, column, COLUMNS), 1)
        while tl.min(place, 0) < COLUMNS:
            more = place < COLUMNS
            other = first_target + 2 * place
            exact = _exact_cosines(metric, n, other.to(n.dtype), more, D, stride_token, ROWS, EXACT_D)
            better = more & (exact > similarity)
            similarity = tl.where(better, exact, similarity)
            best = tl.where(better, other, best)
            # A source without a direction has cosine 0 with all others: the first one is the best.
            remaining = candidate & (column > place[:, None]) & directed[:, None]
            place = tl.min(tl.where(remaining, column, COLUMNS), 1)
    return similarity, best


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
    metric,
    guide,
    mask,
    keys,
    best,
    first,
    N,
    D,
    S,
    prefix,
    stride_token,
    guide_weight,
    margin,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT_D: tl.constexpr,
    WIDE: tl.constexpr,  # whether offsets inside a sample take 64 bits
):
    """Key and best target of sources [first, first + ROWS) of one sample."""
    similarity, target = _propose(
        metric, mask, first, N, D, prefix, stride_token, margin, ROWS, COLUMNS, BLOCK_D, EXACT_D, WIDE
    )
    s = first + tl.arange(0, ROWS)
    key = _keys(similarity, guide, prefix + prefix % 2 + 2 * s, N, guide_weight)
    tl.store(keys + s, key, mask=s < S)
    tl.store(best + s, target, mask=s < S)


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT_D: tl.constexpr,
    WIDE: tl.constexpr,  # whether offsets inside a sample take 64 bits
):
    b = tl.program_id(0).to(tl.int64)
    S = (N - prefix - prefix % 2 + 1) // 2
    if mask is not None:
        mask += b * N
    if guide is not None:
        guide += b * N
    for first in tl.range(0, S, ROWS, disable_licm=True):
        _store_proposals(
            metric + b * stride_batch,
            guide,
            mask,
            keys + b * S,
            best + b * S,
            first,
            N,
            D,
            S,
            prefix,
            stride_token,
            guide_weight,
            margin,
            ROWS,
            COLUMNS,
            BLOCK_D,
            EXACT_D,
            WIDE,
        )
    tl.debug_barrier()  # the proposals of all warps are there
    write_maps(b, keys, best, partner, mask, assignment, kept, removed, merged_mask, dropped, N, S, r, prefix)


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT_D: tl.constexpr,
    WIDE: tl.constexpr,  # whether offsets inside a sample take 64 bits
):
    S = (N - prefix - prefix % 2 + 1) // 2
    groups = tl.cdiv(S, ROWS)
    b = (tl.program_id(0) // groups).to(tl.int64)
    if mask is not None:
        mask += b * N
    if guide is not None:
        guide += b * N
    _store_proposals(
        metric + b * stride_batch,
        guide,
        mask,
        keys + b * S,
        best + b * S,
        tl.program_id(0) % groups * ROWS,
        N,
        D,
        S,
        prefix,
        stride_token,
        guide_weight,
        margin,
        ROWS,
        COLUMNS,
        BLOCK_D,
        EXACT_D,
        WIDE,
    )


@triton.jit(do_not_specialize=("N", "r", "prefix"))
def merging_match_maps_kernel(mask, keys, best, partner, assignment, kept, removed, merged_mask, dropped, N, r, prefix):
    b = tl.program_id(0).to(tl.int64)
    if mask is not None:
        mask += b * N
    S = (N - prefix - prefix % 2 + 1) // 2
    write_maps(b, keys, best, partner, mask, assignment, kept, removed, merged_mask, dropped, N, S, r, prefix)


def margin(dtype: torch.dtype, width: int) -> float:
    """By how much two cosines from the tensor cores may differ although those behind them tie, or stand the other way
    round.

    A sum of ``width`` products of unit vectors loses at most 2^-22 for each of them, where the tensor cores align what
    they add and cut it off; 64 more cover the lengths and the scaling by them. float32 loses what `_product` leaves
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
    flags = 0 if mask is None else 1
    maps = (
        metric.new_empty(batch, tokens, dtype=torch.int64),
        metric.new_empty(batch, tokens - r, dtype=torch.int64),
        metric.new_empty(batch, r, dtype=torch.int64),
        metric.new_empty(batch, flags * (tokens - r), dtype=torch.bool),
        metric.new_empty(batch, flags * tokens, dtype=torch.bool),
    )
    if batch == 0:
        return maps
    metric = with_unit_stride(metric)
    guide, mask = (None if given is None else given.contiguous() for given in (guide, mask))
    keys = metric.new_empty(batch, sources, dtype=torch.int64)
    best = metric.new_empty(batch, sources, dtype=torch.int32)
    partner = metric.new_empty(batch, sources, dtype=torch.int32)
    written = maps if flags else (*maps[:3], None, None)
    scoring = (
        metric.stride(0),
        metric.stride(1),
        struct.unpack("<q", struct.pack("<d", guide_weight))[0],
        margin(metric.dtype, width),
    )
    sizes = {
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "BLOCK_D": BLOCK_D // 2 if metric.dtype == torch.float32 else BLOCK_D,
        "EXACT_D": EXACT_D,
        "WIDE": tokens * metric.stride(1) + width >= 2**31,
        "num_warps": NUM_WARPS,
        "maxnreg": 255,
        "num_stages": 1,  # copies ahead run into the products on sm_90, since lengths read the same tile (Triton 3.8)
    }
    if tokens <= LARGEST_SAMPLE:
        merging_match_kernel[(batch,)](
            metric, guide, mask, keys, best, partner, *written, tokens, width, r, prefix_tokens, *scoring, **sizes
        )
        return maps
    merging_match_similarities_kernel[(batch * triton.cdiv(sources, ROWS),)](
        metric, guide, mask, keys, best, tokens, width, prefix_tokens, *scoring, **sizes
    )
    merging_match_maps_kernel[(batch,)](
        mask, keys, best, partner, *written, tokens, r, prefix_tokens, num_warps=NUM_WARPS
    )
    return maps
