"""Cross-entropy over the rows of a matrix of logits l [B, C], or (B = C) its mean with the same over the columns, and
its gradient.

    row i:     log sum_j exp(l_ij) - l_i,label(i)         column j:     log sum_i exp(l_ij) - l_label(j),j
    dl_ij = grad / 2 (exp(l_ij - lse_row_i) + exp(l_ij - lse_column_j) - targets)

    l, dl [B, C] float32, float16 or bfloat16     labels [B] int64     log-sum-exps float32, in two terms each: the
                                                                       largest logit of a row or column, and the log of
                                                                       the sum of exponentials below it

    kernel      reads                                        writes                               exponentials
    tiles       B C l                                        B C / 16 + B C / 8 bytes of partials 2 B C
    finish      the partials, 2 B l                          4 B float32                          B C / 128 + B C / 64
    loss        32 bytes for 128 rows or columns             1 float32
    backward    B C l, 4 B float32 for each row of tiles     B C dl                               2 B C
    targets     2 B l, 4 B float32                           2 B dl                               4 B

Bound by memory. In half precision the two exponentials of an element take about as long as its 2 bytes.

tiles: a program owns ROWS x COLUMNS logits, which it reads once. For each of its rows and columns it stores the largest
logit and the sum of exponentials below that, with smoothing for rows also the sum of distances from it. finish: a
program owns LINES rows or columns, merges the partials of the tiles in order, and adds up the loss in float64. loss:
one program adds that up in order. backward writes the softmax terms of all elements; targets then overwrites the 2 B
label entries. No atomics: results are bitwise the same from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.triton import with_unit_stride
from mlip_kernels.triton.launch import ceil_div, launch

ROWS, COLUMNS = 64, 128  # of a tile
BACKWARD_ROWS, BACKWARD_COLUMNS = 128, 64  # of a tile: few columns, whose terms every warp reads
LINES = 128  # rows or columns that a program of `finish` owns
TARGETS = 128
NUM_WARPS = 8


@triton.jit
def _origin(largest):
    """What exponentials are taken relative to: the largest logit, 0 where there is none."""
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
    in_bounds = (row < B)[:, None] & (column < C)[None, :]
    value = tl.load(logits + row[:, None] * stride + column[None, :], mask=in_bounds, other=float("-inf")).to(
        tl.float32
    )

    largest = tl.max(value, 1)
    below = value - _origin(largest)[:, None]
    to = row_partial + column_tile.to(tl.int64) * B + row
    kind = column_tiles.to(tl.int64) * B
    tl.store(to, largest, mask=row < B)
    tl.store(to + kind, tl.sum(tl.exp(below), 1), mask=row < B)
    if SMOOTH:
        tl.store(to + 2 * kind, tl.sum(tl.where(in_bounds, below, 0.0), 1), mask=row < B)
    if BOTH:
        largest = tl.max(value, 0)
        to = column_partial + row_tile.to(tl.int64) * C + column
        tl.store(to, largest, mask=column < C)
        sums = tl.sum(tl.exp(value - _origin(largest)[None, :]), 0)
        tl.store(to + row_tiles.to(tl.int64) * C, sums, mask=column < C)


@triton.jit
def _scale(old, new):
    """exp(old - new), and 1 for equal infinities, whose sums need no scaling."""
    return tl.where(old == new, 1.0, tl.exp(old - new))


@triton.jit
def _correction(old, new):
    """Correction of a distance when the largest logit changes from ``old`` to ``new``; 0 where there was none."""
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
    """Terms of LINES rows or columns from ``first`` on, and to ``sums [4, programs]`` their part of the loss."""
    tiles = tl.cdiv(classes, TILE)
    line = (first + tl.arange(0, LINES)).to(tl.int64)
    in_bounds = line < lines
    kind = tiles.to(tl.int64) * lines
    largest = tl.full((LINES,), float("-inf"), tl.float32)
    total = tl.zeros((LINES,), tl.float64)
    distances = tl.zeros((LINES,), tl.float64)
    for tile in range(0, tiles):
        at = partial + tile.to(tl.int64) * lines + line
        in_tile = tl.load(at, mask=in_bounds, other=0.0)
        part = tl.load(at + kind, mask=in_bounds, other=0.0)
        new = tl.maximum(largest, in_tile)
        total = total * _scale(largest, new).to(tl.float64) + (part * _scale(in_tile, new)).to(tl.float64)
        if DISTANCES:
            before = tile * TILE
            count = tl.minimum(TILE, classes - before)
            moved = before.to(tl.float64) * _correction(largest, new)
            distances += moved + count.to(tl.float64) * _correction(in_tile, new)
            distances += tl.load(at + 2 * kind, mask=in_bounds, other=0.0).to(tl.float64)
        largest = new

    log = tl.where(largest == float("-inf"), float("nan"), tl.log(total.to(tl.float32)))
    tl.store(terms + line, largest, mask=in_bounds)
    tl.store(terms + lines + line, log, mask=in_bounds)
    label = tl.load(labels + line, mask=in_bounds, other=0)
    own = tl.load(
        logits + line * line_stride + label * class_stride,
        mask=in_bounds & (label >= 0) & (label < classes),
        other=float("nan"),
    ).to(tl.float32)
    wide = largest.to(tl.float64)
    to = sums + first // LINES
    tl.store(to, tl.sum(tl.where(in_bounds, log.to(tl.float64) + (wide - own.to(tl.float64)), 0.0), 0))
    tl.store(to + programs, tl.sum(tl.where(in_bounds, log.to(tl.float64), 0.0), 0))
    tl.store(to + 2 * programs, tl.sum(tl.where(in_bounds, wide, 0.0), 0))
    tl.store(to + 3 * programs, tl.sum(tl.where(in_bounds, distances, 0.0), 0))


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
    row_tiles, column_tiles = ceil_div(rows, ROWS), ceil_div(columns, COLUMNS)
    of_rows, of_columns = ceil_div(rows, LINES), ceil_div(columns, LINES) * both
    row_partial = row_terms.new_empty(2 + smooth, column_tiles, rows)
    column_partial = row_terms.new_empty(2, row_tiles * both, columns)
    row_sums = row_terms.new_empty(4, of_rows, dtype=torch.float64)
    column_sums = row_sums.new_empty(4, of_columns)
    shape, tile = (rows, columns, logits.stride(0)), {"ROWS": ROWS, "COLUMNS": COLUMNS}
    launch(
        contrastive_pair_cross_entropy_tiles_forward_kernel,
        (row_tiles * column_tiles,),
        logits,
        row_partial,
        column_partial,
        *shape,
        BOTH=both,
        SMOOTH=smooth,
        **tile,
        num_warps=NUM_WARPS,
    )
    partials_and_results = (row_partial, column_partial, row_terms, column_terms, row_sums, column_sums)
    launch(
        contrastive_pair_cross_entropy_finish_forward_kernel,
        (of_rows + of_columns,),
        logits,
        labels,
        *partials_and_results,
        *shape,
        SMOOTH=smooth,
        **tile,
        LINES=LINES,
    )
    launch(
        contrastive_pair_cross_entropy_loss_forward_kernel,
        (1,),
        row_sums,
        column_sums,
        loss,
        rows,
        columns,
        label_smoothing,
        BOTH=both,
        SMOOTH=smooth,
        LINES=LINES,
    )
    return loss, row_terms, column_terms


@triton.jit
def contrastive_pair_cross_entropy_backward_kernel(
    grad,  # 0-d
    logits,  # [B, C], unit stride in C
    row_terms,  # [2, B]
    column_terms,  # [2, C] if BOTH
    grad_logits,  # [B, C]
    B,
    C,
    stride,
    even,  # the target of smoothing for every element, of rows and columns together
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_tiles = tl.cdiv(C, COLUMNS)
    row = (tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    in_bounds = (row < B)[:, None] & (column < C)[None, :]
    value = tl.load(logits + row[:, None] * stride + column[None, :], mask=in_bounds, other=0.0).to(tl.float32)
    largest = tl.load(row_terms + row, mask=row < B, other=0.0)
    log = tl.load(row_terms + B + row, mask=row < B, other=0.0)
    probability = tl.exp((value - largest[:, None]) - log[:, None])
    weight = tl.load(grad)
    if BOTH:
        largest = tl.load(column_terms + column, mask=column < C, other=0.0)
        log = tl.load(column_terms + C + column, mask=column < C, other=0.0)
        probability += tl.exp((value - largest[None, :]) - log[None, :])
        weight *= 0.5
    result = (probability - even) * weight
    to = grad_logits + row[:, None] * C + column[None, :]
    tl.store(to, result.to(grad_logits.dtype.element_ty), mask=in_bounds)


@triton.jit
def _less_target(value, terms, line, lines, is_target, mask, even, smoothing):
    """The probability of a logit in its row or column, less the target."""
    largest = tl.load(terms + line, mask=mask, other=0.0)
    log = tl.load(terms + lines + line, mask=mask, other=0.0)
    return (tl.exp((value - largest) - log) - even) - tl.where(is_target, 1.0 - smoothing, 0.0)


@triton.jit
def contrastive_pair_cross_entropy_targets_backward_kernel(
    grad,
    logits,
    labels,
    row_terms,
    column_terms,
    grad_logits,
    B,
    C,
    stride,
    even,  # the target of smoothing for every element, of rows or of columns
    smoothing,
    BOTH: tl.constexpr,
    TARGETS: tl.constexpr,
):
    i = (tl.program_id(0) * TARGETS + tl.arange(0, TARGETS)).to(tl.int64)
    label = tl.load(labels + i, mask=i < B, other=-1)
    in_range = (label >= 0) & (label < C)
    weight = tl.load(grad)

    value = tl.load(logits + i * stride + label, mask=in_range, other=0.0).to(tl.float32)
    result = _less_target(value, row_terms, i, B, in_range, in_range, even, smoothing)
    if BOTH:
        weight *= 0.5
        mutual = tl.load(labels + label, mask=in_range, other=-1) == i
        result += _less_target(value, column_terms, label, C, mutual, in_range, even, smoothing)
    tl.store(grad_logits + i * C + label, (result * weight).to(grad_logits.dtype.element_ty), mask=in_range)

    if BOTH:  # the target of column i, unless it was that of a row
        alone = in_range & ~mutual
        value = tl.load(logits + label * stride + i, mask=alone, other=0.0).to(tl.float32)
        result = _less_target(value, column_terms, i, C, alone, alone, even, smoothing)
        result += _less_target(value, row_terms, label, B, mutual, alone, even, smoothing)
        tl.store(grad_logits + label * C + i, (result * weight).to(grad_logits.dtype.element_ty), mask=alone)


def pair_cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_terms: Tensor,
    column_terms: Tensor,
    both: bool,
    label_smoothing: float,
) -> Tensor:
    """``mlip_kernels::contrastive_pair_cross_entropy_backward`` on CUDA tensors."""
    rows, columns = logits.shape
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if grad_logits.numel() == 0:
        return grad_logits
    logits, labels = with_unit_stride(logits), labels.contiguous()
    row_terms, column_terms = row_terms.contiguous(), column_terms.contiguous()
    even = label_smoothing / columns
    tiles = ceil_div(rows, BACKWARD_ROWS) * ceil_div(columns, BACKWARD_COLUMNS)
    tensors, shape = (row_terms, column_terms, grad_logits), (rows, columns, logits.stride(0))
    launch(
        contrastive_pair_cross_entropy_backward_kernel,
        (tiles,),
        grad,
        logits,
        *tensors,
        *shape,
        (2 if both else 1) * even,
        BOTH=both,
        ROWS=BACKWARD_ROWS,
        COLUMNS=BACKWARD_COLUMNS,
        num_warps=NUM_WARPS,
    )
    launch(
        contrastive_pair_cross_entropy_targets_backward_kernel,
        (ceil_div(rows, TARGETS),),
        grad,
        logits,
        labels,
        *tensors,
        *shape,
        even,
        label_smoothing,
        BOTH=both,
        TARGETS=TARGETS,
    )
    return grad_logits
