"""Transforms of tokens on a grid, for every channel; on the token axis without what acts along H.

    separable   Y = A_h X A_w^T         x [B, prefix + H W, D]     to  y [B, prefix + R K, D]; prefix tokens are copied
    analysis    Z = M_h (X R_w^T)       x [B, prefix + H W, D]     to  z [B, R, K, D], real and imaginary part
    synthesis   X = (M_h Z) S_w^T       z [B, R, K, D], two parts  to  x [B, prefix + H W, D]; prefix tokens are 0

    x, y, z float32, float16 or bfloat16     A_h [R, H], A_w [K, W], M_h [2, R, H], R_w [2 K, W], S_w [W, 2 K] float32

    kernel      reads                  writes                 flops
    separable   B (prefix + H W) D x   B (prefix + R K) D y   2 B D K H (W + R)
    analysis    B H W D x              2 B R K D z            2 B D K H (2 W + 4 R)
    synthesis   2 B R K D z            B (prefix + H W) D x   2 B D K H (4 R + 2 W)

On the tensor cores six times as many flops, three times for bfloat16. Matrices are read once per program.

One pass, bound by memory; tiles.py says how work is split, and how transforms too large for a tile are done.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.triton import with_unit_stride
from mlip_kernels.triton.spectral.tiles import (
    NOT_SPECIALIZED,
    as_grid,
    choose_grid,
    copy_prefix,
    fits,
    launch_arguments,
    load_matrices,
    point_elements,
    points_of,
    real_matrix,
    spectrum_elements,
    spectrum_of,
    synthesize_axes,
    transform_axes,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def spectral_separable_kernel(
    x,  # [B, prefix + H W, D], unit stride in D
    out,  # [B, prefix + R K, D]
    matrix_h,
    matrix_w,
    sizes,
    strides,
    B,
    D,
    prefix,
    stride_batch,
    stride_token,
    TILE: tl.constexpr,
):
    _, _, R, K = sizes
    first_channel = tl.program_id(0) * TILE.BLOCK_D
    matrices = load_matrices(matrix_h, matrix_w, sizes, strides, TILE)
    token, channel, in_bounds = point_elements(sizes, D, first_channel, TILE)
    number, _, out_channel, out_in_bounds = spectrum_elements(sizes, D, first_channel, TILE, TILE.BLOCK_D)
    for b in range(tl.program_id(1), B, tl.num_programs(1)):
        tokens = x + b.to(tl.int64) * stride_batch
        result = out + b.to(tl.int64) * (prefix + R * K) * D
        copy_prefix(tokens, result, stride_token, prefix, D, first_channel, True, TILE.BLOCK_D)
        rows = (prefix + token).to(tl.int64)
        points = tl.load(tokens + rows * stride_token + channel, mask=in_bounds, other=0.0).to(tl.float32)
        y, _imaginary = spectrum_of(points, matrices, TILE)
        to = result + (prefix + number).to(tl.int64) * D + out_channel
        tl.store(to, y.to(out.dtype.element_ty), mask=out_in_bounds)


def separable(
    x: Tensor, matrix_h: Tensor | None, matrix_w: Tensor, height: int, width: int, prefix_tokens: int
) -> Tensor:
    """``mlip_kernels::spectral_separable`` on CUDA tensors."""
    sizes = (height, width, height if matrix_h is None else matrix_h.shape[0], matrix_w.shape[0])
    out = x.new_empty(x.shape[0], prefix_tokens + sizes[2] * sizes[3], x.shape[2])
    if not fits(matrix_h, sizes):
        out[:, :prefix_tokens] = x[:, :prefix_tokens]
        tokens, result = as_grid(x, height, width, prefix_tokens), as_grid(out, *sizes[2:], prefix_tokens)
        transform_axes(tokens, matrix_h, matrix_w, result[None], x.dtype != torch.bfloat16)
    elif out.numel():
        x = with_unit_stride(x)
        arguments = launch_arguments(x, matrix_h, matrix_w, sizes, prefix_tokens, fourier=False)
        spectral_separable_kernel[choose_grid(arguments)](x, out, **arguments)
    return out


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def spectral_analysis_kernel(
    x,  # [B, prefix + H W, D], unit stride in D
    real_part,  # [B, R, K, D]
    imaginary_part,  # [B, R, K, D]
    matrix_h,
    matrix_w,
    sizes,
    strides,
    B,
    D,
    prefix,
    stride_batch,
    stride_token,
    TILE: tl.constexpr,
):
    _, _, R, K = sizes
    first_channel = tl.program_id(0) * TILE.BLOCK_D
    matrices = load_matrices(matrix_h, matrix_w, sizes, strides, TILE)
    token, channel, in_bounds = point_elements(sizes, D, first_channel, TILE)
    number, _, out_channel, out_in_bounds = spectrum_elements(sizes, D, first_channel, TILE, TILE.BLOCK_D)
    for b in range(tl.program_id(1), B, tl.num_programs(1)):
        rows = (prefix + token).to(tl.int64)
        tokens = x + b.to(tl.int64) * stride_batch
        points = tl.load(tokens + rows * stride_token + channel, mask=in_bounds, other=0.0).to(tl.float32)
        real, imaginary = spectrum_of(points, matrices, TILE)
        to = (b.to(tl.int64) * R * K + number) * D + out_channel
        tl.store(real_part + to, real.to(real_part.dtype.element_ty), mask=out_in_bounds)
        tl.store(imaginary_part + to, imaginary.to(imaginary_part.dtype.element_ty), mask=out_in_bounds)


def analysis(
    x: Tensor, matrix_h: Tensor | None, matrix_w: Tensor, height: int, width: int, prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """``mlip_kernels::spectral_analysis`` on CUDA tensors."""
    sizes = (height, width, height if matrix_h is None else matrix_h.shape[1], matrix_w.shape[0] // 2)
    shape = (x.shape[0], *sizes[2:], x.shape[2])
    if not fits(matrix_h, sizes):
        tokens, out = as_grid(x, height, width, prefix_tokens), x.new_empty(2, *shape)
        real, imaginary = transform_axes(tokens, real_matrix(matrix_h), matrix_w, out, x.dtype != torch.bfloat16)
        return real, imaginary
    real, imaginary = x.new_empty(shape), x.new_empty(shape)
    if real.numel():
        x = with_unit_stride(x)
        arguments = launch_arguments(x, matrix_h, matrix_w, sizes, prefix_tokens, fourier=True)
        spectral_analysis_kernel[choose_grid(arguments)](x, real, imaginary, **arguments)
    return real, imaginary


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def spectral_synthesis_kernel(
    real_part,  # [B, R, K, D]
    imaginary_part,  # [B, R, K, D]
    out,  # [B, prefix + H W, D]
    matrix_h,  # [2, R, H], transposed: the transform is the adjoint of an analysis with the conjugate
    matrix_w,  # [2 K, W], transposed
    sizes,
    strides,
    B,
    D,
    prefix,
    TILE: tl.constexpr,
):
    H, W, R, K = sizes
    first_channel = tl.program_id(0) * TILE.BLOCK_D
    w_real, w_imaginary, h_real, h_imaginary = load_matrices(matrix_h, matrix_w, sizes, strides, TILE)
    matrices = (w_real, w_imaginary, h_real, -h_imaginary)
    token, channel, out_in_bounds = point_elements(sizes, D, first_channel, TILE)
    number, _, from_channel, in_bounds = spectrum_elements(sizes, D, first_channel, TILE, TILE.BLOCK_D)
    for b in range(tl.program_id(1), B, tl.num_programs(1)):
        result = out + b.to(tl.int64) * (prefix + H * W) * D
        copy_prefix(result, result, D, prefix, D, first_channel, False, TILE.BLOCK_D)
        at = (b.to(tl.int64) * R * K + number) * D + from_channel
        real = tl.load(real_part + at, mask=in_bounds, other=0.0).to(tl.float32)
        imaginary = tl.load(imaginary_part + at, mask=in_bounds, other=0.0).to(tl.float32)
        points = points_of(real, imaginary, matrices, TILE)
        to = result + (prefix + token).to(tl.int64) * D + channel
        tl.store(to, points.to(out.dtype.element_ty), mask=out_in_bounds)


def synthesis(real: Tensor, imaginary: Tensor, matrix_h: Tensor | None, matrix_w: Tensor, prefix_tokens: int) -> Tensor:
    """``mlip_kernels::spectral_synthesis`` on CUDA tensors."""
    batch, rows, frequencies, channels = real.shape
    sizes = (rows if matrix_h is None else matrix_h.shape[1], matrix_w.shape[0], rows, frequencies)
    out = real.new_empty(batch, prefix_tokens + sizes[0] * sizes[1], channels)
    if not fits(matrix_h, sizes):
        out[:, :prefix_tokens] = 0
        tokens = as_grid(out, *sizes[:2], prefix_tokens)
        synthesize_axes(real, imaginary, real_matrix(matrix_h), matrix_w, tokens, real.dtype != torch.bfloat16)
    elif out.numel():
        matrix_h = None if matrix_h is None else matrix_h.mT
        arguments = launch_arguments(real, matrix_h, matrix_w.t(), sizes, prefix_tokens, fourier=True)
        spectral_synthesis_kernel[choose_grid(arguments)](real.contiguous(), imaginary.contiguous(), out, **arguments)
    return out
