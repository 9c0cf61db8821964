"""Separable maps of tokens on a grid: Y = A_h X A_w^T for every channel; on the token axis Y = A_w X.

    x [B, prefix + H W, D] float32, float16 or bfloat16     A_h [H', H], A_w [W', W] float32
    y [B, prefix + H' W', D] as x; the prefix tokens are copied

    reads    B (prefix + H W) D x, the matrices once per program
    writes   B (prefix + H' W') D y
    flops    2 B D W' H (W + H'), six times that many on the tensor cores, three times for bfloat16

One pass, bound by memory. A program owns BLOCK_D channels and every splits-th batch element: see tiles.py. A long token
axis is left to long_axis.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.triton.layouts import with_unit_stride
from mlip_kernels.triton.spectral import long_axis
from mlip_kernels.triton.spectral.launches import NOT_SPECIALIZED, fits, plan, programs
from mlip_kernels.triton.spectral.tiles import (
    copy_prefix,
    point_elements,
    read_matrices,
    spectrum_elements,
    spectrum_of,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def spectral_separable_kernel(
    x,  # [B, prefix + H W, D], unit stride in D
    out,  # [B, prefix + R K, D]
    along_h,
    along_w,
    sizes,
    strides,
    B,
    D,
    prefix,
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
    _, _, R, K = sizes
    first_channel = tl.program_id(0) * BLOCK_D
    matrices = read_matrices(along_h, along_w, sizes, strides, FOURIER, GRID, HEIGHT, WIDTH, ROWS, COLUMNS)
    token, channel, there = point_elements(sizes, D, first_channel, HEIGHT, WIDTH, BLOCK_D)
    number, _, to_channel, made = spectrum_elements(sizes, D, first_channel, GRID, ROWS, COLUMNS, BLOCK_D)
    for b in range(tl.program_id(1), B, tl.num_programs(1)):
        tokens = x + b.to(tl.int64) * stride_batch
        result = out + b.to(tl.int64) * (prefix + R * K) * D
        copy_prefix(tokens, result, stride_token, prefix, D, first_channel, True, BLOCK_D)
        rows = (prefix + token).to(tl.int64)
        points = tl.load(tokens + rows * stride_token + channel, mask=there, other=0.0).to(tl.float32)
        y, _imaginary = spectrum_of(points, matrices, FOURIER, GRID, EXACT, HEIGHT, WIDTH, ROWS, COLUMNS, BLOCK_D)
        to = result + (prefix + number).to(tl.int64) * D + to_channel
        tl.store(to, y.to(out.dtype.element_ty), mask=made)


def separable(
    x: Tensor, along_h: Tensor | None, along_w: Tensor, height: int, width: int, prefix_tokens: int
) -> Tensor:
    """``mlip_kernels::spectral_separable`` on CUDA tensors."""
    sizes = (height, width, height if along_h is None else along_h.shape[0], along_w.shape[0])
    if not fits(along_h, sizes):
        return long_axis.separable(x, along_h, along_w, height, width, prefix_tokens)
    out = x.new_empty(x.shape[0], prefix_tokens + sizes[2] * sizes[3], x.shape[2])
    if out.numel() == 0:
        return out
    x = with_unit_stride(x)
    arguments = plan(x, along_h, along_w, sizes, fourier=False, exact=x.dtype != torch.bfloat16)
    spectral_separable_kernel[programs(arguments)](
        x, out, prefix=prefix_tokens, stride_batch=x.stride(0), stride_token=x.stride(1), **arguments
    )
    return out
