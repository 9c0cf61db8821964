"""Fourier synthesis of tokens on a grid: X = (M_h Z) S_w^T for every channel; on the token axis X = S_w Z.

    real, imaginary [B, H, K, D] float32, float16 or bfloat16     M_h [2, H', H], S_w [W', 2 K] float32
    x [B, prefix + H' W', D] as real; the prefix tokens are 0

    reads    2 B H K D real and imaginary parts, the matrices once per program
    writes   B (prefix + H' W') D x
    flops    2 B D K H' (4 H + 2 W'), six times that many on the tensor cores, three times for bfloat16

One pass, bound by memory: analysis.py backwards. A program owns BLOCK_D channels and every splits-th batch element: see
tiles.py. A long token axis is left to long_axis.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.triton.spectral import long_axis
from mlip_kernels.triton.spectral.launches import NOT_SPECIALIZED, fits, plan, programs
from mlip_kernels.triton.spectral.tiles import (
    copy_prefix,
    point_elements,
    points_of,
    read_matrices,
    spectrum_elements,
)


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
