"""Energy of each token in some of the frequencies: P x, where the map P keeps those coefficients and makes tokens of
them, squared and summed over channels.

    x, dx [B, prefix + H W, D] float32, float16 or bfloat16     kept [coefficients] float32: 1 or 0
    energies e, gradients g [B, prefix + H W] float32; 0 for the prefix
    e_n = sum_d (P x)_nd^2             dx = 2 P (g P x), since P is a projection; 0 for the prefix

    kernel       reads                              writes                       flops
    energy       B H W D x                          parts B H W partial sums     those of filtered
    finish       parts B H W partial sums           B (prefix + H W) e
    backward     B H W D x, B H W g                 B (prefix + H W) D dx        twice those of filtered

One pass over the tokens each, bound by memory. energy: a program owns a batch element and every parts-th block of
channels, and adds their squares in registers; finish adds the partial sums in order. backward: a program owns BLOCK_D
channels and every splits-th batch element. See tiles.py. A long token axis is left to long_axis.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.triton.layouts import with_unit_stride
from mlip_kernels.triton.spectral import long_axis
from mlip_kernels.triton.spectral.launches import (
    NOT_SPECIALIZED,
    fits,
    plan,
    programs,
)
from mlip_kernels.triton.spectral.tiles import (
    copy_prefix,
    multiplicity,
    of_coefficients,
    over_channels,
    point_elements,
    points_of,
    read_matrices,
    spectrum_elements,
    spectrum_of,
)

CHANNELS_OF_PART = 32  # at least, so that a part is worth its partial sums
PROGRAMS_WANTED = 528  # a few for each multiprocessor of a large GPU
FINISH_BLOCK = 256


@triton.jit
def _kept(
    kept,
    sizes,
    FOURIER: tl.constexpr,
    GRID: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The factor of each element of a spectrum, as often as it counts."""
    _, W, _, _ = sizes
    _, frequency, _, _ = spectrum_elements(sizes, BLOCK_D, 0, GRID, ROWS, COLUMNS, BLOCK_D)
    factor = of_coefficients(kept, sizes, 0.0, GRID, ROWS, COLUMNS, BLOCK_D)
    return factor * multiplicity(frequency, W, FOURIER)


@triton.jit
def _projected(
    points,
    factor,
    matrices,
    FOURIER: tl.constexpr,
    GRID: tl.constexpr,
    EXACT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The points that the kept coefficients make."""
    real, imaginary = spectrum_of(points, matrices, FOURIER, GRID, EXACT, HEIGHT, WIDTH, ROWS, COLUMNS, BLOCK_D)
    real *= factor
    if FOURIER:
        imaginary *= factor
    return points_of(real, imaginary, matrices, FOURIER, GRID, EXACT, HEIGHT, WIDTH, ROWS, COLUMNS, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def spectral_token_energy_kernel(
    x,  # [B, prefix + H W, D], unit stride in D
    kept,  # float32 [R K]
    partial,  # float32 [parts, B, H W]
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
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    matrices = read_matrices(along_h, along_w, sizes, strides, FOURIER, GRID, HEIGHT, WIDTH, ROWS, COLUMNS)
    factor = _kept(kept, sizes, FOURIER, GRID, ROWS, COLUMNS, BLOCK_D)
    energy = tl.zeros((WIDTH, HEIGHT), tl.float32)
    for first_channel in range(part * BLOCK_D, D, tl.num_programs(1) * BLOCK_D):
        token, channel, there = point_elements(sizes, D, first_channel, HEIGHT, WIDTH, BLOCK_D)
        at = b * stride_batch + (prefix + token).to(tl.int64) * stride_token + channel
        points = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        points = _projected(points, factor, matrices, FOURIER, GRID, EXACT, HEIGHT, WIDTH, ROWS, COLUMNS, BLOCK_D)
        energy += tl.sum(tl.reshape(points * points, (WIDTH, HEIGHT, BLOCK_D)), 2)
    w = tl.arange(0, WIDTH)[:, None]
    h = tl.arange(0, HEIGHT)[None, :]
    tl.store(partial + (part * B + b) * H * W + h * W + w, energy, mask=(w < W) & (h < H))


@triton.jit(do_not_specialize=(*NOT_SPECIALIZED, "parts"))
def spectral_token_energy_finish_kernel(
    partial,  # [parts, B, count]
    energy,  # [B, prefix + count]
    parts,
    B,
    count,
    prefix,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    there = (n >= prefix) & (n < prefix + count)
    for part in range(0, parts):
        total += tl.load(partial + (part * B + b) * count + n - prefix, mask=there, other=0.0)
    tl.store(energy + b * (prefix + count) + n, total, mask=n < prefix + count)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def spectral_token_energy_backward_kernel(
    grad,  # float32 [B, prefix + H W]
    x,  # [B, prefix + H W, D], unit stride in D
    kept,  # float32 [R K]
    grad_x,  # [B, prefix + H W, D]
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
    factor = _kept(kept, sizes, FOURIER, GRID, ROWS, COLUMNS, BLOCK_D)
    token, channel, there = point_elements(sizes, D, first_channel, HEIGHT, WIDTH, BLOCK_D)
    w = tl.arange(0, WIDTH)[:, None]
    h = tl.arange(0, HEIGHT)[None, :]
    for b in range(tl.program_id(1), B, tl.num_programs(1)):
        result = grad_x + b.to(tl.int64) * (prefix + H * W) * D
        copy_prefix(result, result, D, prefix, D, first_channel, False, BLOCK_D)
        rows = (prefix + token).to(tl.int64)
        tokens = x + b.to(tl.int64) * stride_batch
        points = tl.load(tokens + rows * stride_token + channel, mask=there, other=0.0).to(tl.float32)
        points = _projected(points, factor, matrices, FOURIER, GRID, EXACT, HEIGHT, WIDTH, ROWS, COLUMNS, BLOCK_D)
        energies = grad + b.to(tl.int64) * (prefix + H * W) + prefix
        points *= over_channels(2.0 * tl.load(energies + h * W + w, mask=(w < W) & (h < H), other=0.0), BLOCK_D)
        points = _projected(points, factor, matrices, FOURIER, GRID, EXACT, HEIGHT, WIDTH, ROWS, COLUMNS, BLOCK_D)
        tl.store(result + rows * D + channel, points.to(grad_x.dtype.element_ty), mask=there)


def token_energy(
    x: Tensor, kept: Tensor, along_h: Tensor | None, along_w: Tensor, height: int, width: int, prefix_tokens: int
) -> Tensor:
    """``mlip_kernels::spectral_token_energy`` on CUDA tensors."""
    fourier = kept.dim() == 3
    sizes = (height, width, height, along_w.shape[0] // (1 + fourier))
    if not fits(along_h, sizes):
        return long_axis.token_energy(x, kept, along_h, along_w, height, width, prefix_tokens)
    energy = along_w.new_empty(x.shape[:2])
    if energy.numel() == 0:
        return energy
    x = with_unit_stride(x)
    arguments = plan(x, along_h, along_w, sizes, fourier=fourier, exact=True)
    batch, count = x.shape[0], height * width
    parts = min(triton.cdiv(x.shape[2], CHANNELS_OF_PART), triton.cdiv(PROGRAMS_WANTED, batch))
    partial = energy.new_empty(parts, batch, count)
    spectral_token_energy_kernel[batch, parts](
        x,
        kept.contiguous(),
        partial,
        prefix=prefix_tokens,
        stride_batch=x.stride(0),
        stride_token=x.stride(1),
        **arguments,
    )
    spectral_token_energy_finish_kernel[batch, triton.cdiv(energy.shape[1], FINISH_BLOCK)](
        partial, energy, parts, batch, count, prefix_tokens, BLOCK=FINISH_BLOCK
    )
    return energy


def token_energy_backward(
    grad: Tensor,
    x: Tensor,
    kept: Tensor,
    along_h: Tensor | None,
    along_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
) -> Tensor:
    """``mlip_kernels::spectral_token_energy_backward`` on CUDA tensors."""
    fourier = kept.dim() == 3
    sizes = (height, width, height, along_w.shape[0] // (1 + fourier))
    if not fits(along_h, sizes):
        return long_axis.token_energy_backward(grad, x, kept, along_h, along_w, height, width, prefix_tokens)
    grad_x = x.new_empty(x.shape)
    if grad_x.numel() == 0:
        return grad_x
    x = with_unit_stride(x)
    exact = x.dtype != torch.bfloat16
    arguments = plan(x, along_h, along_w, sizes, fourier=fourier, exact=exact, crowded=fourier)
    spectral_token_energy_backward_kernel[programs(arguments)](
        grad.contiguous(),
        x,
        kept.contiguous(),
        grad_x,
        prefix=prefix_tokens,
        stride_batch=x.stride(0),
        stride_token=x.stride(1),
        **arguments,
    )
    return grad_x
