"""Size-weighted mean over the tokens behind the prefix: ``y_b = sum_n w_bn x_bn / W_b`` with ``W_b = sum_n w_bn``.

    x [B, N, D] float32, float16 or bfloat16     w [B, N] float32     y [B, D] as x
    dx_bn = w_bn / W_b g_b                       dw_bn = (<g_b, x_bn> - sum_m w_bm <g_b, x_bm> / W_b) / W_b

    kernel              reads                     writes           flops
    sums (+ finish)     B N D x, B N w            B D y            2 B N D
    backward            B D g, B N w              B N D dx         B N D
    products, centre    B N D x, B D g, B N w     B N dw           2 B N D

Bound by memory throughout: 2 flops per element at most. Sums are kept in float32.

sums: a program owns BLOCK_D channels of one batch element and walks over its tokens, BLOCK_N at a time. Where B D alone
gives too few programs, the tokens are cut into splits whose partial sums ``finish`` adds in order: no atomics, and the
result is bitwise the same from run to run. backward, products: a program owns BLOCK_N tokens of one batch element.
centre: a program owns a batch element.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.triton import contiguous, with_unit_stride
from mlip_kernels.triton.launch import ceil_div, launch, planned

BLOCK_N = 16
BLOCK_D = 128
PROGRAMS_WANTED = 512  # a few for each multiprocessor of a large GPU
TOKENS_PER_SPLIT = 256  # at least, so that a split is worth its partial sums
TILE = {"BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "num_warps": 4}


class Tiling(NamedTuple):
    """How many parts the tokens of one batch element are cut into, and the grid of each kernel."""

    splits: int
    sums: tuple[int, int]
    finish: tuple[int]
    rows: tuple[int]  # backward and products
    centre: tuple[int]


@planned
def tiling(batch: int, tokens: int, channels: int, prefix_tokens: int) -> Tiling:
    """How the work is split; it depends on the shape alone, so results do not change from one GPU to another."""
    columns = batch * ceil_div(channels, BLOCK_D)
    splits = max(1, min(ceil_div(PROGRAMS_WANTED, columns), (tokens - prefix_tokens) // TOKENS_PER_SPLIT))
    return Tiling(splits, (columns, splits), (columns,), (batch * ceil_div(tokens, BLOCK_N),), (batch,))


@triton.jit
def _ratio(a, total):
    return tl.where(total == 0, 0.0, a / tl.where(total == 0, 1.0, total))


@triton.jit
def _weights(weight, batch, rows, N, mask, HAS_WEIGHT: tl.constexpr):
    """Weights of tokens ``rows`` [BLOCK_N], 0 outside the mask."""
    if HAS_WEIGHT:
        return tl.load(weight + batch * N + rows, mask=mask, other=0.0)
    return tl.where(mask, 1.0, 0.0)


@triton.jit
def weighted_mean_sums_forward_kernel(
    x,  # [B, N, D], unit stride in D
    weight,  # [B, N], or anything if not HAS_WEIGHT
    mean,  # [B, D], or float32 [splits, B, D] if SPLIT
    total,  # [B], or [splits, B] if SPLIT
    N,
    D,
    prefix,
    stride_batch,
    stride_token,
    length,  # tokens per split
    HAS_WEIGHT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column_blocks = tl.cdiv(D, BLOCK_D)
    batch = (tl.program_id(0) // column_blocks).to(tl.int64)
    column_block = tl.program_id(0) % column_blocks
    split = tl.program_id(1).to(tl.int64)
    channels = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    first = prefix + split * length
    last = tl.minimum(first + length, N)

    sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    weights = tl.zeros((BLOCK_N,), tl.float32)
    for n in range(first, last, BLOCK_N):
        rows = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
        w = _weights(weight, batch, rows, N, rows < last, HAS_WEIGHT)
        # A token of weight 0 is left out whatever it holds, NaN included.
        used = (w != 0)[:, None] & (channels < D)[None, :]
        values = tl.load(
            x + batch * stride_batch + rows[:, None] * stride_token + channels[None, :], mask=used, other=0.0
        )
        sums += w[:, None] * values.to(tl.float32)
        weights += w

    sum_of_weights = tl.sum(weights, 0)
    result = tl.sum(sums, 0)
    row = batch
    if SPLIT:
        row += split * (tl.num_programs(0) // column_blocks)
    else:
        result = _ratio(result, sum_of_weights)
    tl.store(mean + row * D + channels, result.to(mean.dtype.element_ty), mask=channels < D)
    tl.store(total + row, sum_of_weights, mask=column_block == 0)


@triton.jit
def weighted_mean_finish_forward_kernel(
    partial,  # [splits, B, D]
    partial_total,  # [splits, B]
    mean,  # [B, D]
    total,  # [B]
    B,
    D,
    splits,
    BLOCK_D: tl.constexpr,
):
    column_blocks = tl.cdiv(D, BLOCK_D)
    batch = (tl.program_id(0) // column_blocks).to(tl.int64)
    column_block = tl.program_id(0) % column_blocks
    channels = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    weights = 0.0
    for split in range(0, splits):
        row = split.to(tl.int64) * B + batch
        sums += tl.load(partial + row * D + channels, mask=channels < D, other=0.0)
        weights += tl.load(partial_total + row)
    tl.store(mean + batch * D + channels, _ratio(sums, weights).to(mean.dtype.element_ty), mask=channels < D)
    tl.store(total + batch, weights, mask=column_block == 0)


@triton.jit
def weighted_mean_backward_kernel(
    grad,  # [B, D]
    weight,  # [B, N], or anything if not HAS_WEIGHT
    total,  # [B]
    grad_x,  # [B, N, D]
    N,
    D,
    prefix,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_blocks = tl.cdiv(N, BLOCK_N)
    batch = (tl.program_id(0) // row_blocks).to(tl.int64)
    rows = (tl.program_id(0) % row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    live = (rows >= prefix) & (rows < N)
    normalized_weight = _ratio(_weights(weight, batch, rows, N, live, HAS_WEIGHT), tl.load(total + batch))
    for d in range(0, D, BLOCK_D):
        channels = d + tl.arange(0, BLOCK_D)
        g = tl.load(grad + batch * D + channels, mask=channels < D, other=0.0).to(tl.float32)
        values = tl.where(live[:, None], normalized_weight[:, None] * g[None, :], 0.0)
        in_bounds = (rows < N)[:, None] & (channels < D)[None, :]
        to = grad_x + (batch * N + rows[:, None]) * D + channels[None, :]
        tl.store(to, values.to(grad_x.dtype.element_ty), mask=in_bounds)


@triton.jit
def weighted_mean_products_backward_kernel(
    grad,  # [B, D]
    x,  # [B, N, D], unit stride in D
    weight,  # [B, N]
    grad_weight,  # [B, N]: <g_b, x_bn>; where the weight is 0, what is not finite in x counts as 0
    N,
    D,
    prefix,
    stride_batch,
    stride_token,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_blocks = tl.cdiv(N, BLOCK_N)
    batch = (tl.program_id(0) // row_blocks).to(tl.int64)
    rows = (tl.program_id(0) % row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    live = (rows >= prefix) & (rows < N)
    used = tl.load(weight + batch * N + rows, mask=live, other=0.0) != 0
    products = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        channels = d + tl.arange(0, BLOCK_D)
        in_bounds = live[:, None] & (channels < D)[None, :]
        g = tl.load(grad + batch * D + channels, mask=channels < D, other=0.0).to(tl.float32)
        values = tl.load(
            x + batch * stride_batch + rows[:, None] * stride_token + channels[None, :], mask=in_bounds, other=0.0
        )
        values = values.to(tl.float32)
        finite = tl.abs(values) < float("inf")
        products += g[None, :] * tl.where(used[:, None] | finite, values, 0.0)
    tl.store(grad_weight + batch * N + rows, tl.sum(products, 1), mask=live)


@triton.jit
def weighted_mean_centre_backward_kernel(
    weight,  # [B, N]
    total,  # [B]
    grad_weight,  # [B, N]: products on entry, <g_b, x_bn - y_b> / W_b on return
    N,
    prefix,
    BLOCK_N: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    sum_of_weights = tl.load(total + batch)
    along_mean = tl.zeros((BLOCK_N,), tl.float32)
    for n in range(prefix, N, BLOCK_N):
        rows = n + tl.arange(0, BLOCK_N)
        w = tl.load(weight + batch * N + rows, mask=rows < N, other=0.0)
        product = tl.load(grad_weight + batch * N + rows, mask=rows < N, other=0.0)
        along_mean += _ratio(w, sum_of_weights) * product
    centre = tl.sum(along_mean, 0)  # <g, y> = sum of w / W <g, x>
    for n in range(0, N, BLOCK_N):
        rows = n + tl.arange(0, BLOCK_N)
        live = (rows >= prefix) & (rows < N)
        product = tl.load(grad_weight + batch * N + rows, mask=live, other=0.0)
        value = tl.where(live, _ratio(product - centre, sum_of_weights), 0.0)
        tl.store(grad_weight + batch * N + rows, value, mask=rows < N)


def forward(x: Tensor, weight: Tensor | None, prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """``mlip_kernels::merging_weighted_mean`` on CUDA tensors."""
    batch, tokens, channels = x.shape
    mean = x.new_empty(batch, channels)
    total = x.new_empty(batch, dtype=torch.float32)
    if batch == 0:
        return mean, total
    x, (weight,) = with_unit_stride(x), contiguous(weight)
    split = tiling(batch, tokens, channels, prefix_tokens)
    several = split.splits > 1
    sums = x.new_empty(split.splits, batch, channels, dtype=torch.float32) if several else mean
    weights = x.new_empty(split.splits, batch, dtype=torch.float32) if several else total
    launch(
        weighted_mean_sums_forward_kernel,
        split.sums,
        x,
        x if weight is None else weight,
        sums,
        weights,
        *(tokens, channels, prefix_tokens, x.stride(0), x.stride(1)),
        ceil_div(tokens - prefix_tokens, split.splits),
        HAS_WEIGHT=weight is not None,
        SPLIT=several,
        **TILE,
    )
    if several:
        launch(
            weighted_mean_finish_forward_kernel,
            split.finish,
            sums,
            weights,
            mean,
            total,
            batch,
            channels,
            split.splits,
            BLOCK_D=BLOCK_D,
        )
    return mean, total


def backward(grad: Tensor, weight: Tensor | None, total: Tensor, tokens: int, prefix_tokens: int) -> Tensor:
    """``mlip_kernels::merging_weighted_mean_backward`` on CUDA tensors."""
    batch, channels = grad.shape
    grad_x = grad.new_empty(batch, tokens, channels)
    if batch:
        grad, weight = contiguous(grad, weight)
        tensors, sizes = (grad, grad if weight is None else weight, total, grad_x), (tokens, channels, prefix_tokens)
        rows = tiling(batch, tokens, channels, prefix_tokens).rows
        launch(weighted_mean_backward_kernel, rows, *tensors, *sizes, HAS_WEIGHT=weight is not None, **TILE)
    return grad_x


def backward_weight(grad: Tensor, x: Tensor, weight: Tensor, total: Tensor, prefix_tokens: int) -> Tensor:
    """``mlip_kernels::merging_weighted_mean_backward_weight`` on CUDA tensors."""
    batch, tokens, channels = x.shape
    grad_weight = total.new_empty(batch, tokens)
    if batch:
        grad, weight, x = grad.contiguous(), weight.contiguous(), with_unit_stride(x)
        split = tiling(batch, tokens, channels, prefix_tokens)
        sizes = (tokens, channels, prefix_tokens, x.stride(0), x.stride(1))
        launch(weighted_mean_products_backward_kernel, split.rows, grad, x, weight, grad_weight, *sizes, **TILE)
        launch(
            weighted_mean_centre_backward_kernel,
            split.centre,
            weight,
            total,
            grad_weight,
            tokens,
            prefix_tokens,
            BLOCK_N=256,
        )
    return grad_weight
