"""Gradient of the cross-entropy over the rows, or the rows and columns, of a matrix of logits (pair_cross_entropy.py):

    dl_ij = grad / 2 (exp(l_ij - lse_row_i) + exp(l_ij - lse_column_j) - targets)

    l, dl [B, C] float32, float16 or bfloat16     labels [B] int64     log-sum-exps float32, in two terms each

    kernel      reads                                        writes     exponentials
    backward    B C l, 4 B float32 for each row of tiles     B C dl     2 B C
    targets     2 B l, 4 B float32                           2 B dl     4 B

Bound by memory. backward writes what the gradient is without targets, elementwise; targets then writes the 2 B elements
that are one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.triton.layouts import with_unit_stride

ROWS, COLUMNS = 128, 64  # of a tile: few columns, whose terms every warp reads
TARGETS = 128
NUM_WARPS = 8


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
    even,  # what smoothing takes from every probability, of rows and columns
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_tiles = tl.cdiv(C, COLUMNS)
    row = (tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < B)[:, None] & (column < C)[None, :]
    value = tl.load(logits + row[:, None] * stride + column[None, :], mask=there, other=0.0).to(tl.float32)
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
    tl.store(to, result.to(grad_logits.dtype.element_ty), mask=there)


@triton.jit
def _less_target(value, terms, line, lines, is_target, mask, even, smoothing):
    """The probability of a logit in its line, less the target."""
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
    even,  # what smoothing takes from every probability, of rows or of columns
    smoothing,
    BOTH: tl.constexpr,
    TARGETS: tl.constexpr,
):
    i = (tl.program_id(0) * TARGETS + tl.arange(0, TARGETS)).to(tl.int64)
    label = tl.load(labels + i, mask=i < B, other=-1)
    named = (label >= 0) & (label < C)
    weight = tl.load(grad)

    value = tl.load(logits + i * stride + label, mask=named, other=0.0).to(tl.float32)
    result = _less_target(value, row_terms, i, B, named, named, even, smoothing)
    if BOTH:
        weight *= 0.5
        mutual = tl.load(labels + label, mask=named, other=-1) == i
        result += _less_target(value, column_terms, label, C, mutual, named, even, smoothing)
    tl.store(grad_logits + i * C + label, (result * weight).to(grad_logits.dtype.element_ty), mask=named)

    if BOTH:  # the target of column i, unless it was that of a row
        alone = named & ~mutual
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
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS)
    contrastive_pair_cross_entropy_backward_kernel[tiles,](
        grad,
        logits,
        row_terms,
        column_terms,
        grad_logits,
        rows,
        columns,
        logits.stride(0),
        (2 if both else 1) * even,
        BOTH=both,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=NUM_WARPS,
    )
    contrastive_pair_cross_entropy_targets_backward_kernel[triton.cdiv(rows, TARGETS),](
        grad,
        logits,
        labels,
        row_terms,
        column_terms,
        grad_logits,
        rows,
        columns,
        logits.stride(0),
        even,
        label_smoothing,
        BOTH=both,
        TARGETS=TARGETS,
    )
    return grad_logits
