"""Fourier analysis of tokens on a grid: Z = M_h (X R_w^T) for every channel; on the token axis Z = R_w X.

    x [B, prefix + H W, D] float32, float16 or bfloat16     M_h [2, H', H], R_w [2 K, W] float32: real, imaginary part
    real, imaginary [B, H', K, D] as x; the prefix tokens are left out

    reads    B H W D x, the matrices once per program
    writes   2 B H' K D real and imaginary parts
    flops    2 B D K H (2 W + 4 H'), six times that many on the tensor cores, three times for bfloat16

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
    point_elements,
    read_matrices,
    spectrum_elements,
    spectrum_of,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def spectral_analysis_kernel(
    x,  # [B, prefix + H W, D], unit stride in D
    real_part,  # [B, R, K, D]
    imaginary_part,  # [B, R, K, D]
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
        rows = (prefix + token).to(tl.int64)
        tokens = x + b.to(tl.int64) * stride_batch
        points = tl.load(tokens + rows * stride_token + channel, mask=there, other=0.0).to(tl.float32)
        real, imaginary = spectrum_of(points, matrices, FOURIER, GRID, EXACT, HEIGHT, WIDTH, ROWS, COLUMNS, BLOCK_D)
        to = (b.to(tl.int64) * R * K + number) * D + to_channel
        tl.store(real_part + to, real.to(real_part.dtype.element_ty), mask=made)
        tl.store(imaginary_part + to, imaginary.to(imaginary_part.dtype.element_ty), mask=made)


def analysis(
    x: Tensor, along_h: Tensor | None, along_w: Tensor, height: int, width: int, prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """``mlip_kernels::spectral_analysis`` on CUDA tensors."""
    sizes = (height, width, height if along_h is None else along_h.shape[1], along_w.shape[0] // 2)
    if not fits(along_h, sizes):
        return long_axis.analysis(x, along_h, along_w, height, width, prefix_tokens)
    real = x.new_empty(x.shape[0], *sizes[2:], x.shape[2])
    imaginary = torch.empty_like(real)
    if real.numel() == 0:
        return real, imaginary
    x = with_unit_stride(x)
    arguments = plan(x, along_h, along_w, sizes, fourier=True, exact=x.dtype != torch.bfloat16)
    spectral_analysis_kernel[programs(arguments)](
        x, real, imaginary, prefix=prefix_tokens, stride_batch=x.stride(0), stride_token=x.stride(1), **arguments
    )
    return real, imaginary
