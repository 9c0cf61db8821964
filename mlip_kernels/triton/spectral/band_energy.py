"""Energy of tokens in bands of frequencies: squared coefficients, summed over those of each band; in Fourier maps a
coefficient with a mirror image counts twice.

    x, dx [B, prefix + H W, D] float32, float16 or bfloat16     bands [coefficients] int32: the band of each
    energies e, gradients g [B, bands, D] as x
    e = sum_c m_c |z_c|^2             dx = 2 F^* (m g z) with the map F: z = F x, as in filtered.py; 0 for the prefix

    kernel       reads                          writes                 flops
    energy       B H W D x                      B bands D e            those of separable or analysis
    backward     B H W D x, B bands D g         B (prefix + H W) D dx  those of filtered

One pass each, bound by memory. A program owns BLOCK_D channels and every splits-th batch element: see tiles.py. For
each band it sums the powers in that band, or gives the gradient of the band to its coefficients. A long token axis is
left to long_axis.py.
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
    of_coefficients,
    point_elements,
    points_of,
    read_matrices,
    spectrum_elements,
    spectrum_of,
)


@triton.jit(do_not_specialize=(*NOT_SPECIALIZED, "count"))
def spectral_band_energy_kernel(
    x,  # [B, prefix + H W, D], unit stride in D
    bands,  # int32 [R K]
    energy,  # [B, count, D]
    along_h,
    along_w,
    sizes,
    strides,
    count,
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
    _, W, _, _ = sizes
    first_channel = tl.program_id(0) * BLOCK_D
    matrices = read_matrices(along_h, along_w, sizes, strides, FOURIER, GRID, HEIGHT, WIDTH, ROWS, COLUMNS)
    token, channel, there = point_elements(sizes, D, first_channel, HEIGHT, WIDTH, BLOCK_D)
    _, frequency, _, _ = spectrum_elements(sizes, D, first_channel, GRID, ROWS, COLUMNS, BLOCK_D)
    band_of = of_coefficients(bands, sizes, -1, GRID, ROWS, COLUMNS, BLOCK_D)
    to_channel = first_channel + tl.arange(0, BLOCK_D)
    for b in range(tl.program_id(1), B, tl.num_programs(1)):
        rows = (prefix + token).to(tl.int64)
        tokens = x + b.to(tl.int64) * stride_batch
        points = tl.load(tokens + rows * stride_token + channel, mask=there, other=0.0).to(tl.float32)
        real, imaginary = spectrum_of(points, matrices, FOURIER, GRID, EXACT, HEIGHT, WIDTH, ROWS, COLUMNS, BLOCK_D)
        power = real * real
        if FOURIER:
            power = (power + imaginary * imaginary) * multiplicity(frequency, W, FOURIER)
        for band in range(0, count):
            members = tl.reshape(tl.where(band_of == band, power, 0.0), (ROWS * COLUMNS, BLOCK_D))
            to = energy + (b.to(tl.int64) * count + band) * D + to_channel
            tl.store(to, tl.sum(members, 0).to(energy.dtype.element_ty), mask=to_channel < D)


@triton.jit(do_not_specialize=(*NOT_SPECIALIZED, "count"))
def spectral_band_energy_backward_kernel(
    grad,  # [B, count, D]
    x,  # [B, prefix + H W, D], unit stride in D
    bands,  # int32 [R K]
    grad_x,  # [B, prefix + H W, D]
    along_h,
    along_w,
    sizes,
    strides,
    count,
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
    token, channel, there = point_elements(sizes, D, first_channel, HEIGHT, WIDTH, BLOCK_D)
    _, frequency, _, _ = spectrum_elements(sizes, D, first_channel, GRID, ROWS, COLUMNS, BLOCK_D)
    band_of = of_coefficients(bands, sizes, -1, GRID, ROWS, COLUMNS, BLOCK_D)
    from_channel = first_channel + tl.arange(0, COLUMNS * BLOCK_D) % BLOCK_D
    for b in range(tl.program_id(1), B, tl.num_programs(1)):
        result = grad_x + b.to(tl.int64) * (prefix + H * W) * D
        copy_prefix(result, result, D, prefix, D, first_channel, False, BLOCK_D)
        rows = (prefix + token).to(tl.int64)
        tokens = x + b.to(tl.int64) * stride_batch
        points = tl.load(tokens + rows * stride_token + channel, mask=there, other=0.0).to(tl.float32)
        real, imaginary = spectrum_of(points, matrices, FOURIER, GRID, EXACT, HEIGHT, WIDTH, ROWS, COLUMNS, BLOCK_D)
        share = tl.zeros((ROWS, COLUMNS * BLOCK_D), tl.float32)
        for band in range(0, count):
            at = grad + (b.to(tl.int64) * count + band) * D + from_channel
            of_band = tl.load(at, mask=from_channel < D, other=0.0).to(tl.float32)
            share = tl.where(band_of == band, of_band[None, :], share)
        share *= 2.0 * multiplicity(frequency, W, FOURIER)
        real *= share
        if FOURIER:
            imaginary *= share
        points = points_of(real, imaginary, matrices, FOURIER, GRID, EXACT, HEIGHT, WIDTH, ROWS, COLUMNS, BLOCK_D)
        tl.store(result + rows * D + channel, points.to(grad_x.dtype.element_ty), mask=there)


def band_energy(
    x: Tensor,
    bands: Tensor,
    count: int,
    along_h: Tensor | None,
    along_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
    fourier: bool,
) -> Tensor:
    """``mlip_kernels::spectral_band_energy`` on CUDA tensors."""
    sizes = (height, width, height, along_w.shape[0] // (1 + fourier))
    if not fits(along_h, sizes):
        return long_axis.band_energy(x, bands, count, along_h, along_w, height, width, prefix_tokens, fourier)
    energy = x.new_empty(x.shape[0], count, x.shape[2])
    if energy.numel() == 0:
        return energy
    x = with_unit_stride(x)
    arguments = plan(x, along_h, along_w, sizes, fourier=fourier, exact=x.dtype != torch.bfloat16)
    spectral_band_energy_kernel[programs(arguments)](
        x,
        bands.contiguous(),
        energy,
        count=count,
        prefix=prefix_tokens,
        stride_batch=x.stride(0),
        stride_token=x.stride(1),
        **arguments,
    )
    return energy


def band_energy_backward(
    grad: Tensor,
    x: Tensor,
    bands: Tensor,
    along_h: Tensor | None,
    along_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
    fourier: bool,
) -> Tensor:
    """``mlip_kernels::spectral_band_energy_backward`` on CUDA tensors."""
    sizes = (height, width, height, along_w.shape[0] // (1 + fourier))
    if not fits(along_h, sizes):
        return long_axis.band_energy_backward(grad, x, bands, along_h, along_w, height, width, prefix_tokens, fourier)
    grad_x = x.new_empty(x.shape)
    if grad_x.numel() == 0:
        return grad_x
    x = with_unit_stride(x)
    arguments = plan(x, along_h, along_w, sizes, fourier=fourier, exact=x.dtype != torch.bfloat16)
    spectral_band_energy_backward_kernel[programs(arguments)](
        grad.contiguous(),
        x,
        bands.contiguous(),
        grad_x,
        count=grad.shape[1],
        prefix=prefix_tokens,
        stride_batch=x.stride(0),
        stride_token=x.stride(1),
        **arguments,
    )
    return grad_x
