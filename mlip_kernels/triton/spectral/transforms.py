"""Linear maps of tokens on a grid or on the token axis, each in one pass.

    x [B, prefix + H W, D] float32, float16 or bfloat16     spectra as x, tokens behind the prefix

    kernel       map for every channel           reads                      writes
    separable    Y = A_h X A_w^T                 B (prefix + H W) D x       B (prefix + H' W') D y, prefix copied
    analysis     Z = M_h (X R_w^T)               B H W D x                  2 B H' K D real and imaginary parts
    synthesis    X = (M_h Z) S_w^T               2 B H K D both parts       B (prefix + H' W') D x, prefix 0

    flops        separable 2 B D W' H (W + H'), Fourier 2 B D K H (2 W + 4 H'), six times that many on the tensor cores,
                 three times for bfloat16

A_h [H', H], A_w [W', W], M_h [2, H', H], R_w [2 K, W] and S_w [W', 2 K] are float32; a program reads them once. On the
token axis there is no matrix along H. Bound by memory. A program owns BLOCK_D channels and every splits-th batch
element: see tiles.py. A long token axis is left to long_axis.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.triton.spectral import long_axis
from mlip_kernels.triton.spectral.launches import NOT_SPECIALIZED, fits, plan, programs, with_unit_stride
from mlip_kernels.triton.spectral.tiles import (
    copy_prefix,
    point_elements,
    points_of,
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


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def spectral_synthesis_kernel(
    real_part,  # [B, R, K, D]
    imaginary_part,  # [B, R, K, D]
    out,  # [B, prefix + H W, D]
    along_h,  # [2, H, R], transposed: the map is the adjoint of an analysis with the conjugate
    along_w,  # [W, 2 K], transposed
    sizes,
    strides,
    B,
    D,
    prefix,
    FOURIER: tl.constexpr,
    GRID: tl.constexpr,
    EXACT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    H, W, R, K = sizes
    first_channel = tl.program_id(0) * BLOCK_D
    w_real, w_imaginary, h_real, h_imaginary = read_matrices(
        along_h, along_w, sizes, strides, FOURIER, GRID, HEIGHT, WIDTH, ROWS, COLUMNS
    )
    matrices = (w_real, w_imaginary, h_real, -h_imaginary)
    token, channel, there = point_elements(sizes, D, first_channel, HEIGHT, WIDTH, BLOCK_D)
    number, _, from_channel, given = spectrum_elements(sizes, D, first_channel, GRID, ROWS, COLUMNS, BLOCK_D)
    for b in range(tl.program_id(1), B, tl.num_programs(1)):
        result = out + b.to(tl.int64) * (prefix + H * W) * D
        copy_prefix(result, result, D, prefix, D, first_channel, False, BLOCK_D)
        at = (b.to(tl.int64) * R * K + number) * D + from_channel
        real = tl.load(real_part + at, mask=given, other=0.0).to(tl.float32)
        imaginary = tl.load(imaginary_part + at, mask=given, other=0.0).to(tl.float32)
        points = points_of(real, imaginary, matrices, FOURIER, GRID, EXACT, HEIGHT, WIDTH, ROWS, COLUMNS, BLOCK_D)
        to = result + (prefix + token).to(tl.int64) * D + channel
        tl.store(to, points.to(out.dtype.element_ty), mask=there)


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


def synthesis(real: Tensor, imaginary: Tensor, along_h: Tensor | None, along_w: Tensor, prefix_tokens: int) -> Tensor:
    """``mlip_kernels::spectral_synthesis`` on CUDA tensors."""
    batch, rows, frequencies, channels = real.shape
    sizes = (rows if along_h is None else along_h.shape[1], along_w.shape[0], rows, frequencies)
    if not fits(along_h, sizes):
        return long_axis.synthesis(real, imaginary, along_h, along_w, prefix_tokens)
    out = real.new_empty(batch, prefix_tokens + sizes[0] * sizes[1], channels)
    if out.numel() == 0:
        return out
    transposed_h = None if along_h is None else along_h.mT
    arguments = plan(real, transposed_h, along_w.t(), sizes, fourier=True, exact=real.dtype != torch.bfloat16)
    spectral_synthesis_kernel[programs(arguments)](
        real.contiguous(), imaginary.contiguous(), out, prefix=prefix_tokens, **arguments
    )
    return out
