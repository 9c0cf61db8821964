"""Cross-entropy over the rows of a matrix of logits l [B, C], or (B = C) its mean with the same over the columns.

    row i:     log sum_j exp(l_ij) - l_i,label(i)         column j:     log sum_i exp(l_ij) - l_label(j),j

    l [B, C] float32, float16 or bfloat16     labels [B] int64     log-sum-exps float32, in two terms each: the largest
                                                                   logit of a line and the log of the sum below it

    kernel      reads                                        writes                               exponentials
    tiles       B C l                                        B C / 16 + B C / 8 bytes of partials 2 B C
    finish      the partials, 2 B l                          4 B float32                          B C / 128 + B C / 64
    loss        32 bytes for 128 lines                       1 float32

Bound by memory: beside 4 bytes, an element of float32 takes two exponentials; in half precision these take about as
long as the memory does.

tiles: a program owns ROWS x COLUMNS logits, which it reads once. It leaves for each of its rows and columns the largest
logit and the sum of exponentials below that, for rows also, with smoothing, the sum of distances from it. finish: a
program owns LINES rows or columns and merges what the tiles left, in order; their loss is added up in float64. loss:
one program adds that up in order. No atomics: the result is bitwise the same from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.triton.layouts import with_unit_stride

ROWS, COLUMNS = 64, 128  # of a tile
LINES = 128
NUM_WARPS = 8


@triton.jit
def _origin(largest):
    """What exponentials are taken below: the largest logit, where there is one."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def contrastive_pair_cross_entropy_tiles_forward_kernel(
    logits,  # [B, C], unit stride in C
    row_partial,  # [2 or with SMOOTH 3, column tiles, B]: largest, sum of exponentials below it, sum of distances
    column_partial,  # [2, row tiles, C] if BOTH
    B,
    C,
    stride,
    BOTH: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_tiles, row_tiles = tl.cdiv(C, COLUMNS), tl.cdiv(B, ROWS)
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    row = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < B)[:, None] & (column < C)[None, :]
    value = tl.load(logits + row[:, None] * stride + column[None, :], mask=there, other=float("-inf")).to(tl.float32)

    largest = tl.max(value, 1)
    below = value - _origin(largest)[:, None]
    to = row_partial + column_tile.to(tl.int64) * B + row
    kind = column_tiles.to(tl.int64) * B
    tl.store(to, largest, mask=row < B)
    tl.store(to + kind, tl.sum(tl.exp(below), 1), mask=row < B)
    if SMOOTH:
        tl.store(to + 2 * kind, tl.sum(tl.where(there, below, 0.0), 1), mask=row < B)
    if BOTH:
        largest = tl.max(value, 0)
        to = column_partial + row_tile.to(tl.int64) * C + column
        tl.store(to, largest, mask=column < C)
        sums = tl.sum(tl.exp(value - _origin(largest)[None, :]), 0)
        tl.store(to + row_tiles.to(tl.int64) * C, sums, mask=column < C)


@triton.jit
def _scale(old, new):
    """exp(old - new); 1 for equal infinities, of which nothing has to be scaled."""
    return tl.where(old == new, 1.0, tl.exp(old - new))


@triton.jit
def _moved(old, new):
    """What a distance grows by that is counted from another largest logit; where there was none, it was from 0."""
    return tl.where((old == new) | (old == float("-inf")), 0.0, old.to(tl.float64) - new.to(tl.float64))


@triton.jit
def _finish(
    logits,
    labels,
    partial,
    terms,
    sums,
    programs,
    first,
    lines,
    classes,
    line_stride,
    class_stride,
    DISTANCES: tl.constexpr,
    TILE: tl.constexpr,
    LINES: tl.constexpr,
):
    """Lines ``first`` and on: their terms, and to ``sums [4, programs]`` what the loss is made of."""
    tiles = tl.cdiv(classes, TILE)
    line = (first + tl.arange(0, LINES)).to(tl.int64)
    there = line < lines
    kind = tiles.to(tl.int64) * lines
    largest = tl.full((LINES,), float("-inf"), tl.float32)
    total = tl.zeros((LINES,), tl.float64)
    distances = tl.zeros((LINES,), tl.float64)
    for tile in range(0, tiles):
        at = partial + tile.to(tl.int64) * lines + line
        here = tl.load(at, mask=there, other=0.0)
        part = tl.load(at + kind, mask=there, other=0.0)
        now = tl.maximum(largest, here)
        total = total * _scale(largest, now).to(tl.float64) + (part * _scale(here, now)).to(tl.float64)
        if DISTANCES:
            before = tile * TILE
            count = tl.minimum(TILE, classes - before)
            distances += before.to(tl.float64) * _moved(largest, now) + count.to(tl.float64) * _moved(here, now)
            distances += tl.load(at + 2 * kind, mask=there, other=0.0).to(tl.float64)
        largest = now

    log = tl.where(largest == float("-inf"), float("nan"), tl.log(total.to(tl.float32)))
    tl.store(terms + line, largest, mask=there)
    tl.store(terms + lines + line, log, mask=there)
    label = tl.load(labels + line, mask=there, other=0)
    own = tl.load(
        logits + line * line_stride + label * class_stride,
        mask=there & (label >= 0) & (label < classes),
        other=float("nan"),
    ).to(tl.float32)
    wide = largest.to(tl.float64)
    to = sums + first // LINES
    tl.store(to, tl.sum(tl.where(there, log.to(tl.float64) + (wide - own.to(tl.float64)), 0.0), 0))
    tl.store(to + programs, tl.sum(tl.where(there, log.to(tl.float64), 0.0), 0))
    tl.store(to + 2 * programs, tl.sum(tl.where(there, wide, 0.0), 0))
    tl.store(to + 3 * programs, tl.sum(tl.where(there, distances, 0.0), 0))


@triton.jit
def contrastive_pair_cross_entropy_finish_forward_kernel(
    logits,  # [B, C], unit stride in C
    labels,  # [B]
    row_partial,
    column_partial,
    row_terms,  # [2, B]
    column_terms,  # [2, C]
    row_sums,  # float64 [4, programs of rows]: losses, logs, maxima, distances
    column_sums,  # float64 [4, programs of columns], the last unused
    B,
    C,
    stride,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LINES: tl.constexpr,
):
    of_rows = tl.cdiv(B, LINES)
    program = tl.program_id(0)
    if program < of_rows:
        _finish(
            logits, labels, row_partial, row_terms, row_sums, of_rows, program * LINES, B, C, stride, 1,
            SMOOTH, COLUMNS, LINES,
        )  # fmt: skip
    else:
        _finish(
            logits, labels, column_partial, column_terms, column_sums, tl.num_programs(0) - of_rows,
            (program - of_rows) * LINES, C, B, 1, stride, False, ROWS, LINES,
        )  # fmt: skip


@triton.jit
def _added(sums, programs, LINES: tl.constexpr):
    total = tl.zeros((LINES,), tl.float64)
    for first in range(0, programs, LINES):
        program = first + tl.arange(0, LINES)
        total += tl.load(sums + program, mask=program < programs, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _loss_of(own, logs, distances, classes, smoothing, SMOOTH: tl.constexpr):
    if SMOOTH:
        return (1.0 - smoothing) * own + smoothing * (logs - distances / classes)
    return own


@triton.jit
def contrastive_pair_cross_entropy_loss_forward_kernel(
    row_sums,
    column_sums,
    loss,  # 0-d
    B,
    C,
    smoothing,
    BOTH: tl.constexpr,
    SMOOTH: tl.constexpr,
    LINES: tl.constexpr,
):
    programs = tl.cdiv(B, LINES)
    own = _added(row_sums, programs, LINES)
    logs = _added(row_sums + programs, programs, LINES)
    maxima = _added(row_sums + 2 * programs, programs, LINES)
    distances = _added(row_sums + 3 * programs, programs, LINES)
    rows, columns = tl.cast(B, tl.float64), tl.cast(C, tl.float64)
    result = _loss_of(own, logs, distances, columns, smoothing, SMOOTH)
    if BOTH:
        programs = tl.cdiv(C, LINES)
        own = _added(column_sums, programs, LINES)
        logs = _added(column_sums + programs, programs, LINES)
        distances += columns * maxima - rows * _added(column_sums + 2 * programs, programs, LINES)
        result = 0.5 * (result + _loss_of(own, logs, distances, rows, smoothing, SMOOTH))
    tl.store(loss, result.to(tl.float32))


def pair_cross_entropy(
    logits: Tensor, labels: Tensor, both: bool, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``mlip_kernels::contrastive_pair_cross_entropy`` on CUDA tensors."""
    rows, columns = logits.shape
    row_terms = logits.new_empty(2, rows, dtype=torch.float32)
    column_terms = row_terms.new_empty(2, columns if both else 0)
    if rows == 0:
        return row_terms.new_zeros(()), row_terms, column_terms
    loss = row_terms.new_empty(())
    logits, labels, smooth = with_unit_stride(logits), labels.contiguous(), label_smoothing != 0
    row_tiles, column_tiles = triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)
    of_rows, of_columns = triton.cdiv(rows, LINES), triton.cdiv(columns, LINES) * both
    row_partial = row_terms.new_empty(2 + smooth, column_tiles, rows)
    column_partial = row_terms.new_empty(2, row_tiles * both, columns)
    row_sums = row_terms.new_empty(4, of_rows, dtype=torch.float64)
    column_sums = row_sums.new_empty(4, of_columns)
    tile = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    contrastive_pair_cross_entropy_tiles_forward_kernel[row_tiles * column_tiles,](
        logits,
        row_partial,
        column_partial,
        rows,
        columns,
        logits.stride(0),
        BOTH=both,
        SMOOTH=smooth,
        **tile,
        num_warps=NUM_WARPS,
    )
    contrastive_pair_cross_entropy_finish_forward_kernel[of_rows + of_columns,](
        logits,
        labels,
        row_partial,
        column_partial,
        row_terms,
        column_terms,
        row_sums,
        column_sums,
        rows,
        columns,
        logits.stride(0),
        SMOOTH=smooth,
        **tile,
        LINES=LINES,
    )
    contrastive_pair_cross_entropy_loss_forward_kernel[1,](
        row_sums, column_sums, loss, rows, columns, label_smoothing, BOTH=both, SMOOTH=smooth, LINES=LINES
    )
    return loss, row_terms, column_terms
