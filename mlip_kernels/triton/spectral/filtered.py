"""Spectral filter of tokens on a grid or on the token axis: an orthonormal map, a weight for each coefficient and
channel, the inverse map.

    x, y [B, prefix + H W, D] float32, float16 or bfloat16; the prefix tokens are copied
    cosine    A_h [H, H], A_w [W, W], weight [H, W, D]                Y = A_h^T (weight * A_h X A_w^T) A_w
    Fourier   M_h [2, H, H], R_w [2 K, W], weight [H, K, D, 2]        as analysis, complex product, synthesis

    reads    B (prefix + H W) D x, the weight and the matrices once per program
    writes   B (prefix + H W) D y
    flops    cosine 4 B D H W (H + W), Fourier 4 B D H K (4 H + 2 W), six times that many on the tensor cores, three
             times for bfloat16

One pass, bound by memory. A program owns BLOCK_D channels and every splits-th batch element, and keeps the weights of
its channels in registers: see tiles.py. A long token axis is left to long_axis.py.
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
    multiplicity,
    point_elements,
    points_of,
    read_matrices,
    spectrum_elements,
    spectrum_of,
)


@triton.jit
def _weights(
    weight,
    sizes,
    D,
    first_channel,
    FOURIER: tl.constexpr,
    GRID: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Real and imaginary part of the weight of each element of a spectrum, as often as it counts."""
    _, W, _, _ = sizes
    if FOURIER:
        # Real and imaginary part lie together: as twice as many channels they are read in one access.
        number, frequency, channel, there = spectrum_elements(
            sizes, 2 * D, 2 * first_channel, GRID, ROWS, COLUMNS, 2 * BLOCK_D
        )
        pairs = tl.load(weight + number * 2 * D + channel, mask=there, other=0.0)
        pairs *= multiplicity(frequency, W, FOURIER)
        return tl.split(tl.reshape(pairs, (ROWS, COLUMNS * BLOCK_D, 2)))
    else:
        number, _, channel, there = spectrum_elements(sizes, D, first_channel, GRID, ROWS, COLUMNS, BLOCK_D)
        real = tl.load(weight + number * D + channel, mask=there, other=0.0)
        return real, real


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def spectral_filtered_kernel(
    x,  # [B, prefix + H W, D], unit stride in D
    weight,  # float32 [H, K, D], or [H, K, D, 2] if FOURIER
    out,  # [B, prefix + H W, D]
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
    H, W, _, _ = sizes
    first_channel = tl.program_id(0) * BLOCK_D
    matrices = read_matrices(along_h, along_w, sizes, strides, FOURIER, GRID, HEIGHT, WIDTH, ROWS, COLUMNS)
    weight_real, weight_imaginary = _weights(weight, sizes, D, first_channel, FOURIER, GRID, ROWS, COLUMNS, BLOCK_D)
    token, channel, there = point_elements(sizes, D, first_channel, HEIGHT, WIDTH, BLOCK_D)
    for b in range(tl.program_id(1), B, tl.num_programs(1)):
        tokens = x + b.to(tl.int64) * stride_batch
        result = out + b.to(tl.int64) * (prefix + H * W) * D
        copy_prefix(tokens, result, stride_token, prefix, D, first_channel, True, BLOCK_D)
        points = tl.load(tokens + (prefix + token).to(tl.int64) * stride_token + channel, mask=there, other=0.0).to(
            tl.float32
        )
        real, imaginary = spectrum_of(points, matrices, FOURIER, GRID, EXACT, HEIGHT, WIDTH, ROWS, COLUMNS, BLOCK_D)
        product = real * weight_real
        if FOURIER:
            product -= imaginary * weight_imaginary
            imaginary = real * weight_imaginary + imaginary * weight_real
        points = points_of(product, imaginary, matrices, FOURIER, GRID, EXACT, HEIGHT, WIDTH, ROWS, COLUMNS, BLOCK_D)
        tl.store(result + (prefix + token).to(tl.int64) * D + channel, points.to(out.dtype.element_ty), mask=there)


def filtered(
    x: Tensor, weight: Tensor, along_h: Tensor | None, along_w: Tensor, height: int, width: int, prefix_tokens: int
) -> Tensor:
    """``mlip_kernels::spectral_filtered`` on CUDA tensors."""
    fourier = weight.dim() == 4
    sizes = (height, width, height, along_w.shape[0] // (1 + fourier))
    if not fits(along_h, sizes):
        return long_axis.filtered(x, weight, along_h, along_w, height, width, prefix_tokens)
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    x = with_unit_stride(x)
    arguments = plan(x, along_h, along_w, sizes, fourier=fourier, exact=x.dtype != torch.bfloat16)
    spectral_filtered_kernel[programs(arguments)](
        x,
        weight.contiguous(),
        out,
        prefix=prefix_tokens,
        stride_batch=x.stride(0),
        stride_token=x.stride(1),
        **arguments,
    )
    return out
