"""From the proposals of one sample to the maps that merging needs (device code).

Three stages, each behind a barrier, since a stage reads what other threads of the one before wrote:

    partner       the row that each source merges into: its best target if fewer than r sources come before it, by score
                  and then by position, which S^2 comparisons count; else -1
    places        where every row goes: prefix, unmerged sources, targets, padding, merged sources, each ascending; what
                  comes after the N - r output rows starts none
    assignment    of merged sources: that of their target

All is integers, so no order of additions matters.
"""

from __future__ import annotations

import triton
import triton.language as tl

RANKED = tl.constexpr(64)  # sources whose rank is counted
AGAINST = tl.constexpr(64)  # sources that they are compared with at a time
CHUNK = tl.constexpr(1024)  # rows that are placed at a time


@triton.jit
def _choose(keys, best, partner, S, r):
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
    """What becomes of rows [first, first + CHUNK): whether they are in the prefix and real, and a one in 16 bits each
    for an unmerged source, a target, padding and a merged source, counted from the lowest bits."""
    n = first + tl.arange(0, CHUNK)
    inside = n < N
    real = inside
    if mask is not None:
        real = tl.load(mask + n, mask=inside, other=0) != 0
    behind = inside & (n >= prefix)
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
def _place(partner, mask, assignment, kept, removed, merged_mask, dropped, N, r, prefix):
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
        place = tl.where(bits == 0, next_unmerged + _field(counts, 0), next_target + _field(counts, 1))
        place = tl.where(bits == 32, next_padding + _field(counts, 2), place)
        place = tl.where(bits == 48, next_merged + _field(counts, 3), place)
        place = tl.where(n < prefix, n, place)
        inside = n < N
        lost = place >= outputs
        tl.store(kept + place, n.to(tl.int64), mask=inside & ~lost)
        tl.store(removed + (place - outputs), n.to(tl.int64), mask=inside & lost)
        merged = (n >= prefix) & (bits == 48)
        tl.store(assignment + n, tl.minimum(place, outputs - 1).to(tl.int64), mask=inside & ~merged)
        if mask is not None:
            tl.store(merged_mask + place, real, mask=inside & ~lost)
            tl.store(dropped + n, lost & ~merged, mask=inside)
        total = tl.sum(ones, 0)
        next_unmerged += _field(total, 0)
        next_target += _field(total, 1)
        next_padding += _field(total, 2)
        next_merged += _field(total, 3)


@triton.jit
def write_maps(b, keys, best, partner, mask, assignment, kept, removed, merged_mask, dropped, N, S, r, prefix):
    """Maps of sample ``b``. ``mask`` points to that sample, everything else to the first one."""
    keys += b * S
    best += b * S
    partner += b * S
    assignment += b * N
    if mask is not None:
        merged_mask += b * (N - r)
        dropped += b * N
    _choose(keys, best, partner, S, r)
    tl.debug_barrier()
    _place(partner, mask, assignment, kept + b * (N - r), removed + b * r, merged_mask, dropped, N, r, prefix)
    tl.debug_barrier()
    for first in range(0, S, CHUNK):
        s = first + tl.arange(0, CHUNK)
        target = tl.load(partner + s, mask=s < S, other=-1)
        merged = target >= 0
        place = tl.load(assignment + target, mask=merged, other=0)
        tl.store(assignment + (prefix + prefix % 2 + 2 * s), place, mask=merged)
