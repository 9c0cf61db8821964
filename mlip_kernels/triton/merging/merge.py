"""Merging rows of tokens, x [B, N, C] to [B, N', C] with N' = N - r, and the transposed copy back.

    merge     y_o = sum_n w_n x_n over the rows n of output row o, where w_n = size_n / size_o
    combine   the same with given weights w [B, N], or with none
    spread    unmerge: x_n = w_n y_a(n), with a(n) the output row of input row n; with no weights y_a(n)

    x, y float32, float16 or bfloat16     sizes and weights float32     index maps int64     masks boolean

    reads    merge, combine: B N C x; spread: B N' C y, rows of several input rows once for each; the index maps,
             8 B (N' + r) bytes, and 8 B r more for the output rows of removed rows; sizes or weights
    writes   B N' C y, for spread B N C x; merge also 4 B N' bytes of sizes and 4 B N of weights

Bound by memory: one multiply-add per element at most. Every program of a sample reads the index maps of the removed
rows, once for combine and twice for merge, all but the first time from a cache.

A program owns ROWS output rows and BLOCK_C channels. It starts from the rows that are kept, walks over the removed
rows of its sample, SCANNED at a time, and adds those that belong to its rows. Each step adds one term to every row that
still has one, so there are as many steps as a row has terms, mostly one or two. The terms of a row are added in the
order of `removed`, and the product is rounded before the addition as in plain PyTorch (the launches switch fused
multiply-adds off), so that results have the bits of the reference. A row that is alone and has weight 1 is stored as it
was loaded.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.triton import contiguous, with_unit_stride

ELEMENTS = 4096  # of a program's tile
WIDTHS = (1024, 512, 256)  # channels of it
MOST_ROWS = 32
SCANNED = 256  # removed rows looked at in one step: one for each thread
NUM_WARPS = 8
NOT_SPECIALIZED = ("N", "outputs")  # or each size could compile the kernel anew


@triton.jit
def _once(pointers, mask):
    """Values at ``pointers [ROWS]``, 0 outside the mask. One lane reads each: every warp would read a vector that is
    shorter than the program has threads."""
    lane = tl.arange(0, 32)[None, :]
    return tl.sum(tl.load(pointers[:, None] + 0 * lane, mask=mask[:, None] & (lane == 0), other=0), 1)


@triton.jit
def _within(row, rows):
    """Row numbers, clamped: no index map may lead outside of the tensors."""
    return tl.minimum(tl.maximum(row, 0), rows - 1)


@triton.jit
def _scan(assignment, removed, dropped, first, first_row, N, r, SCANNED: tl.constexpr):
    """Input rows ``removed [first, first + SCANNED)``, and which of the program's rows they belong to, counted from the
    first one; -1 for those that have none."""
    k = first + tl.arange(0, SCANNED)
    in_bounds = k < r
    n = _within(tl.load(removed + k, mask=in_bounds, other=0), N)
    owner = (tl.load(assignment + n, mask=in_bounds, other=0) - first_row).to(tl.int32)
    if dropped is not None:
        in_bounds = in_bounds & (tl.load(dropped + n, mask=in_bounds, other=1) == 0)
    return n.to(tl.int32), tl.where(in_bounds, owner, -1)


@triton.jit
def _next(owner, after, ROWS: tl.constexpr, SCANNED: tl.constexpr):
    """For every row the first position behind ``after [ROWS]`` at which it is the owner; SCANNED where it owns none."""
    position = tl.arange(0, SCANNED)[None, :]
    found = (owner[None, :] == tl.arange(0, ROWS)[:, None]) & (position > after[:, None])
    return tl.min(tl.where(found, position, SCANNED), 1)


@triton.jit
def _pick(values, position, SCANNED: tl.constexpr):
    """``values [SCANNED]`` at each ``position [ROWS]``; 0 where that is out of range."""
    return tl.sum(tl.where(tl.arange(0, SCANNED)[None, :] == position[:, None], values[None, :], 0), 1)


@triton.jit
def _of_owners(values, owner, ROWS: tl.constexpr):
    """``values [ROWS]`` of each ``owner [SCANNED]``; 0 where that is no row of the program."""
    return tl.sum(tl.where(owner[None, :] == tl.arange(0, ROWS)[:, None], values[:, None], 0), 0)


@triton.jit
def _load_rows(x, n, stride_token, c, mask, C):
    at = n.to(tl.int64)[:, None] * stride_token + c[None, :]
    return tl.load(x + at, mask=mask[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def _add_rows(
    total,  # [ROWS, BLOCK_C]
    alone,  # [ROWS], whether no term was added yet
    x,
    n,
    owner,
    weight,  # [SCANNED], or None: every weight is 1
    c,
    C,
    stride_token,
    ROWS: tl.constexpr,
    SCANNED: tl.constexpr,
):
    """Add the rows that `_scan` found, ascending, to the rows of the program."""
    position = _next(owner, tl.full((ROWS,), -1, tl.int32), ROWS, SCANNED)
    while tl.min(position, 0) < SCANNED:
        more = position < SCANNED
        term = _load_rows(x, _pick(n, position, SCANNED), stride_token, c, more, C).to(tl.float32)
        if weight is not None:
            term *= _pick(weight, position, SCANNED)[:, None]
        total = tl.where(more[:, None], total + term, total)
        alone = alone & ~more
        position = _next(owner, position, ROWS, SCANNED)
    return total, alone


@triton.jit
def _store_rows(y, rows, kept_row, kept_weight, total, alone, c, outputs, C):
    """Sums, but the bits of the input for a row that is ``alone`` and has weight 1."""
    copied = alone
    if kept_weight is not None:
        copied = alone & (kept_weight == 1.0)
    result = tl.where(copied[:, None], kept_row, total.to(kept_row.dtype))
    to = y + rows.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(to, result, mask=(rows < outputs)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def merging_combine_kernel(
    x,  # [B, N, C], unit stride in C
    weight,  # [B, N], or None: every weight is 1
    y,  # [B, N', C]
    assignment,  # [B, N]
    kept,  # [B, N']
    removed,  # [B, N - N']
    dropped,  # [B, N] bytes, or None
    N,
    outputs,  # N'
    C,
    stride_batch,
    stride_token,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SCANNED: tl.constexpr,
):
    row_blocks = tl.cdiv(outputs, ROWS)
    b = (tl.program_id(0) // row_blocks).to(tl.int64)
    first_row = tl.program_id(0) % row_blocks * ROWS
    r = N - outputs
    x += b * stride_batch
    if dropped is not None:
        dropped += b * N
    if weight is not None:
        weight += b * N

    rows = first_row + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = rows < outputs
    kept_n = _within(_once(kept + b * outputs + rows, real), N)
    kept_row = _load_rows(x, kept_n, stride_token, c, real, C)
    total = kept_row.to(tl.float32)
    kept_weight = None
    if weight is not None:
        kept_weight = _once(weight + kept_n, real)
        total *= kept_weight[:, None]
    alone = real
    for first in range(0, r, SCANNED):
        n, owner = _scan(assignment + b * N, removed + b * r, dropped, first, first_row, N, r, SCANNED)
        given = None
        if weight is not None:
            given = tl.load(weight + n, mask=(owner >= 0) & (owner < ROWS), other=0.0)
        total, alone = _add_rows(total, alone, x, n, owner, given, c, C, stride_token, ROWS, SCANNED)
    _store_rows(y + b * outputs * C, rows, kept_row, kept_weight, total, alone, c, outputs, C)


@triton.jit
def _scan_sizes(size, assignment, removed, dropped, first, first_row, N, r, ROWS: tl.constexpr, SCANNED: tl.constexpr):
    """What `_scan` finds, and the sizes of those that belong to rows of the program, 0 for the others."""
    n, owner = _scan(assignment, removed, dropped, first, first_row, N, r, SCANNED)
    owned = (owner >= 0) & (owner < ROWS)
    sizes = owned.to(tl.float32)
    if size is not None:
        sizes = tl.load(size + n, mask=owned, other=0.0)
    return n, owner, sizes


@triton.jit
def _add_sizes(total, owner, sizes, ROWS: tl.constexpr, SCANNED: tl.constexpr):
    """Add the ``sizes`` that `_scan_sizes` found, ascending, to ``total [ROWS]``."""
    position = _next(owner, tl.full((ROWS,), -1, tl.int32), ROWS, SCANNED)
    while tl.min(position, 0) < SCANNED:
        total = tl.where(position < SCANNED, total + _pick(sizes, position, SCANNED), total)
        position = _next(owner, position, ROWS, SCANNED)
    return total


@triton.jit
def _divided(weight, n, owner, sizes, divisor, ROWS: tl.constexpr):
    """Weights of the rows that `_scan_sizes` found, also stored by the first column of programs."""
    owned = (owner >= 0) & (owner < ROWS)
    quotient = tl.div_rn(sizes, tl.where(owned, _of_owners(divisor, owner, ROWS), 1.0))
    tl.store(weight + n, quotient, mask=owned & (tl.program_id(1) == 0))
    return quotient


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def merging_merge_kernel(
    x,  # [B, N, C], unit stride in C
    size,  # [B, N], or None: every size is 1
    y,  # [B, N', C]
    merged_size,  # [B, N']
    weight,  # [B, N]
    assignment,  # [B, N]
    kept,  # [B, N']
    removed,  # [B, N - N']
    mask,  # [B, N'] bytes, or None
    dropped,  # [B, N] bytes, or None
    N,
    outputs,  # N'
    C,
    stride_batch,
    stride_token,
    SEVERAL: tl.constexpr,  # whether it takes more than one step to scan the removed rows
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SCANNED: tl.constexpr,
):
    row_blocks = tl.cdiv(outputs, ROWS)
    b = (tl.program_id(0) // row_blocks).to(tl.int64)
    first_row = tl.program_id(0) % row_blocks * ROWS
    r = N - outputs
    x += b * stride_batch
    weight += b * N
    assignment += b * N
    removed += b * r
    if size is not None:
        size += b * N
    if dropped is not None:
        dropped += b * N
        if (first_row == 0) & (tl.program_id(1) == 0):
            for first in range(0, r, SCANNED):
                k = first + tl.arange(0, SCANNED)
                n = _within(tl.load(removed + k, mask=k < r, other=0), N)
                lost = tl.load(dropped + n, mask=k < r, other=0) != 0
                tl.store(weight + n, tl.zeros((SCANNED,), tl.float32), mask=lost)

    rows = first_row + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = rows < outputs
    kept_n = _within(_once(kept + b * outputs + rows, real), N)
    kept_row = _load_rows(x, kept_n, stride_token, c, real, C)
    own = real.to(tl.float32)
    if mask is not None:
        own = (_once(mask + b * outputs + rows, real) != 0).to(tl.float32)
    if size is not None:
        own = _once(size + kept_n, own != 0)

    total = own
    if SEVERAL:
        for first in range(0, r, SCANNED):
            _, owner, sizes = _scan_sizes(size, assignment, removed, dropped, first, first_row, N, r, ROWS, SCANNED)
            total = _add_sizes(total, owner, sizes, ROWS, SCANNED)
    else:
        n, owner, sizes = _scan_sizes(size, assignment, removed, dropped, 0, first_row, N, r, ROWS, SCANNED)
        total = _add_sizes(total, owner, sizes, ROWS, SCANNED)
    divisor = tl.where(total > 0, total, 1.0)
    kept_weight = tl.where(total > 0, tl.div_rn(own, divisor), 1.0)
    stored = real & (tl.program_id(1) == 0)
    tl.store(merged_size + b * outputs + rows, total, mask=stored)
    tl.store(weight + kept_n, kept_weight, mask=stored)

    sums = kept_row.to(tl.float32) * kept_weight[:, None]
    alone = real
    if SEVERAL:
        for first in range(0, r, SCANNED):
            n, owner, sizes = _scan_sizes(size, assignment, removed, dropped, first, first_row, N, r, ROWS, SCANNED)
            w = _divided(weight, n, owner, sizes, divisor, ROWS)
            sums, alone = _add_rows(sums, alone, x, n, owner, w, c, C, stride_token, ROWS, SCANNED)
    else:
        w = _divided(weight, n, owner, sizes, divisor, ROWS)
        sums, alone = _add_rows(sums, alone, x, n, owner, w, c, C, stride_token, ROWS, SCANNED)
    _store_rows(y + b * outputs * C, rows, kept_row, kept_weight, sums, alone, c, outputs, C)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def merging_spread_kernel(
    y,  # [B, N', C], unit stride in C
    weight,  # [B, N], or None: every weight is 1
    x,  # [B, N, C]
    assignment,  # [B, N]
    dropped,  # [B, N] bytes, or None
    N,
    outputs,  # N'
    C,
    stride_batch,
    stride_token,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row_blocks = tl.cdiv(N, ROWS)
    b = (tl.program_id(0) // row_blocks).to(tl.int64)
    rows = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = rows < N
    given = real
    if dropped is not None:
        given = real & (_once(dropped + b * N + rows, real) == 0)
    n = _within(_once(assignment + b * N + rows, given), outputs)
    row = _load_rows(y + b * stride_batch, n, stride_token, c, given, C)
    if weight is not None:
        w = _once(weight + b * N + rows, given)[:, None]
        row = tl.where(w == 1.0, row, (row.to(tl.float32) * w).to(row.dtype))
    to = x + b * N * C + rows.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(to, row, mask=real[:, None] & (c < C)[None, :])


def merge(
    x: Tensor,
    size: Tensor | None,
    assignment: Tensor,
    kept: Tensor,
    removed: Tensor,
    mask: Tensor | None,
    dropped: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``mlip_kernels::merging_merge`` on CUDA tensors."""
    (batch, tokens, channels), outputs = x.shape, kept.shape[1]
    merged = x.new_empty(batch, outputs, channels)
    merged_size = x.new_empty(batch, outputs, dtype=torch.float32)
    weight = x.new_empty(batch, tokens, dtype=torch.float32)
    grid, tile = _tiling(batch, outputs, channels)
    if batch and outputs:
        x = with_unit_stride(x)
        merging_merge_kernel[grid](
            x,
            *contiguous(size),
            merged,
            merged_size,
            weight,
            *contiguous(assignment, kept, removed, mask, dropped),
            *(tokens, outputs, channels, x.stride(0), x.stride(1)),
            SEVERAL=removed.shape[1] > SCANNED,
            SCANNED=SCANNED,
            **tile,
        )
    return merged, merged_size, weight


def combine(
    x: Tensor, weight: Tensor | None, assignment: Tensor, kept: Tensor, removed: Tensor, dropped: Tensor | None
) -> Tensor:
    """``mlip_kernels::merging_combine`` on CUDA tensors."""
    (batch, tokens, channels), outputs = x.shape, kept.shape[1]
    y = x.new_empty(batch, outputs, channels)
    grid, tile = _tiling(batch, outputs, channels)
    if y.numel():
        x = with_unit_stride(x)
        maps = contiguous(assignment, kept, removed, dropped)
        sizes = (tokens, outputs, channels, x.stride(0), x.stride(1))
        merging_combine_kernel[grid](x, *contiguous(weight), y, *maps, *sizes, SCANNED=SCANNED, **tile)
    return y


def spread(
    y: Tensor, weight: Tensor | None, assignment: Tensor, kept: Tensor, removed: Tensor, dropped: Tensor | None
) -> Tensor:
    """``mlip_kernels::merging_spread`` on CUDA tensors."""
    (batch, tokens), channels = assignment.shape, y.shape[2]
    x = y.new_empty(batch, tokens, channels)
    grid, tile = _tiling(batch, tokens, channels)
    if x.numel():
        y = with_unit_stride(y)
        sizes = (tokens, y.shape[1], channels, y.stride(0), y.stride(1))
        merging_spread_kernel[grid](y, *contiguous(weight), x, *contiguous(assignment, dropped), *sizes, **tile)
    return x


def _tiling(batch: int, rows: int, channels: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid, and how large a program's tile is."""
    block_c = max(16, triton.next_power_of_2(channels))
    if block_c > WIDTHS[-1]:
        block_c = min(WIDTHS, key=lambda width: triton.cdiv(channels, width) * width)
    block_rows = min(MOST_ROWS, ELEMENTS // block_c)
    grid = batch * triton.cdiv(rows, block_rows), max(1, triton.cdiv(channels, block_c))
    tile = {
        "ROWS": block_rows,
        "BLOCK_C": block_c,
        "num_warps": NUM_WARPS,
        "maxnreg": 255,  # or ptxas aims at more blocks and spills
        "enable_fp_fusion": False,
    }
    return grid, tile
