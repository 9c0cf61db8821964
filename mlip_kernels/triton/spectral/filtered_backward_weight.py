"""Gradient of the weight of a spectral filter: the spectrum of the gradient times that of x, conjugated, summed over
the batch. In Fourier maps a coefficient with a mirror image counts twice.

    x, grad [B, prefix + H W, D] float32, float16 or bfloat16; the prefix tokens take no part
    dW [H, W, D] (cosine) or [H, K, D, 2] (Fourier) float32

    kernel     reads                          writes
    sums       2 B H W D x and grad           splits |dW| partial sums
    finish     splits |dW| partial sums       |dW|
    flops      cosine 4 B D H W (H + W), Fourier 4 B D H K (4 H + 2 W), six times that many on the tensor cores

Bound by memory; both spectra are computed again, which is cheaper than keeping them. A program owns BLOCK_D channels
and every splits-th batch element: see tiles.py. It adds their products in registers, one after another, and a second
kernel adds the partial sums in order: no atomics, the same bits from run to run. A long token axis is left to
long_axis.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.triton.layouts import with_unit_stride
from mlip_kernels.triton.spectral import long_axis
from mlip_kernels.triton.spectral.launches import NOT_SPECIALIZED, fits, parts_of, plan
from mlip_kernels.triton.spectral.tiles import (
    multiplicity,
    point_elements,
    read_matrices,
    spectrum_elements,
    spectrum_of,
)

BLOCKS_WANTED, MOST_SPLITS = 216, 16  # as in CUDA C++, which says why, for each 32 channels
FINISH_BLOCK = 1024


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def spectral_filtered_backward_weight_kernel(
    grad,  # [B, prefix + H W, D], unit stride in D
    x,  # [B, prefix + H W, D], unit stride in D
    partial,  # float32 [splits, H, K, D], or [splits, H, K, D, 2] if FOURIER
    along_h,
    along_w,
    sizes,
    strides,
    B,
    D,
    prefix,
    grad_stride_batch,
    grad_stride_token,
    stride_batch,
    stride_token,
    FOURIER: tl.constexpr,
    GRID: tl.constexpr,
    EXACT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    _, W, R, K = sizes
    first_channel = tl.program_id(0) * BLOCK_D
    split = tl.program_id(1)
    matrices = read_matrices(along_h, along_w, sizes, strides, FOURIER, GRID, HEIGHT, WIDTH, ROWS, COLUMNS)
    token, channel, there = point_elements(sizes, D, first_channel, HEIGHT, WIDTH, BLOCK_D)
    sum_real = tl.zeros((ROWS, COLUMNS * BLOCK_D), tl.float32)
    sum_imaginary = sum_real
    for b in range(split, B, tl.num_programs(1)):
        rows = (prefix + token).to(tl.int64)
        at = b.to(tl.int64) * stride_batch + rows * stride_token + channel
        points = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        x_real, x_imaginary = spectrum_of(points, matrices, FOURIER, GRID, EXACT, HEIGHT, WIDTH, ROWS, COLUMNS, BLOCK_D)
        at = b.to(tl.int64) * grad_stride_batch + rows * grad_stride_token + channel
        points = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
        real, imaginary = spectrum_of(points, matrices, FOURIER, GRID, EXACT, HEIGHT, WIDTH, ROWS, COLUMNS, BLOCK_D)
        sum_real += real * x_real
        if FOURIER:
            sum_real += imaginary * x_imaginary
            sum_imaginary += imaginary * x_real - real * x_imaginary
    if FOURIER:
        # Real and imaginary part lie together: as twice as many channels they are written in one access.
        pairs = tl.reshape(tl.join(sum_real, sum_imaginary), (ROWS, COLUMNS * BLOCK_D * 2))
        number, frequency, to_channel, made = spectrum_elements(
            sizes, 2 * D, 2 * first_channel, GRID, ROWS, COLUMNS, 2 * BLOCK_D
        )
        to = partial + (split.to(tl.int64) * R * K + number) * 2 * D + to_channel
        tl.store(to, pairs * multiplicity(frequency, W, FOURIER), mask=made)
    else:
        number, _, to_channel, made = spectrum_elements(sizes, D, first_channel, GRID, ROWS, COLUMNS, BLOCK_D)
        to = partial + (split.to(tl.int64) * R * K + number) * D + to_channel
        tl.store(to, sum_real, mask=made)


@triton.jit
def spectral_filtered_backward_weight_finish_kernel(
    partial,  # [splits, count]
    grad_weight,  # [count]
    count,
    splits,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        total += tl.load(partial + split.to(tl.int64) * count + at, mask=at < count, other=0.0)
    tl.store(grad_weight + at, total, mask=at < count)


def filtered_backward_weight(
    grad: Tensor,
    x: Tensor,
    along_h: Tensor | None,
    along_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
    fourier: bool,
) -> Tensor:
    """``mlip_kernels::spectral_filtered_backward_weight`` on CUDA tensors."""
    sizes = (height, width, height, along_w.shape[0] // (1 + fourier))
    if not fits(along_h, sizes):
        return long_axis.filtered_backward_weight(grad, x, along_h, along_w, height, width, prefix_tokens, fourier)
    grad_weight = along_w.new_empty(height, sizes[3], x.shape[2], *([2] if fourier else []))
    if grad_weight.numel() == 0 or x.shape[0] == 0:
        return grad_weight.zero_()
    grad, x = with_unit_stride(grad), with_unit_stride(x)
    arguments = plan(x, along_h, along_w, sizes, fourier=fourier, exact=True, crowded=x.element_size() == 4)
    columns = triton.cdiv(x.shape[2], arguments["BLOCK_D"])
    splits = parts_of(x.shape[0], min(BLOCKS_WANTED // triton.cdiv(x.shape[2], 32), MOST_SPLITS))
    partial = grad_weight if splits == 1 else grad_weight.new_empty(splits, *grad_weight.shape)
    spectral_filtered_backward_weight_kernel[columns, splits](
        grad,
        x,
        partial,
        prefix=prefix_tokens,
        grad_stride_batch=grad.stride(0),
        grad_stride_token=grad.stride(1),
        stride_batch=x.stride(0),
        stride_token=x.stride(1),
        **arguments,
    )
    if splits > 1:
        count = grad_weight.numel()
        spectral_filtered_backward_weight_finish_kernel[(triton.cdiv(count, FINISH_BLOCK),)](
            partial, grad_weight, count, splits, BLOCK=FINISH_BLOCK
        )
    return grad_weight
