"""Spectral filter of tokens on a grid or on the token axis: an orthonormal transform, a weight for each coefficient and
channel, the inverse transform. Gradient of the weight: the spectrum of the gradient times that of x, conjugated, summed
over the batch.

    x, y, grad [B, prefix + H W, D] float32, float16 or bfloat16; the prefix tokens are copied, and take no part in dW
    cosine    A_h [H, H], A_w [W, W], weight, dW [H, W, D]              Y = A_h^T (weight * A_h X A_w^T) A_w
    Fourier   M_h [2, H, H], R_w [2 K, W], weight, dW [H, K, D, 2]      as analysis, complex product, synthesis

    kernel             reads                                            writes
    filtered           B (prefix + H W) D x, the weight                 B (prefix + H W) D y
    backward_weight    2 B H W D x and grad                             splits |dW| partial sums
    finish             splits |dW| partial sums                         |dW|

The first two take the flops of two transforms (transforms.py), and read the matrices once per program.

Bound by memory. A program of `filtered` keeps the weights of its channels in registers. backward_weight computes both
spectra again, which is cheaper than keeping them, and adds their products in registers, one after another; finish adds
the partial sums in order: no atomics, the same bits from run to run. In a Fourier transform a coefficient with a mirror
image counts twice. tiles.py says how work is split.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    multiplicity,
    parts_of,
    point_elements,
    points_of,
    real_matrix,
    spectrum_elements,
    spectrum_of,
    synthesize_axes,
    transform_axes,
)

BLOCKS_WANTED, MOST_SPLITS = 216, 16  # as in CUDA C++, which says why, for each 32 channels
FINISH_BLOCK = 1024


@triton.jit
def _load_weights(weight, sizes, D, first_channel, TILE: tl.constexpr):
    """Real and imaginary part of the weight of each element of a spectrum, times its multiplicity."""
    _, W, _, _ = sizes
    if TILE.FOURIER:
        # Real and imaginary part lie together: as twice as many channels they are read in one access.
        number, frequency, channel, in_bounds = spectrum_elements(
            sizes, 2 * D, 2 * first_channel, TILE, 2 * TILE.BLOCK_D
        )
        pairs = tl.load(weight + number * 2 * D + channel, mask=in_bounds, other=0.0)
        pairs *= multiplicity(frequency, W, TILE)
        return tl.split(tl.reshape(pairs, (TILE.ROWS, TILE.COLUMNS * TILE.BLOCK_D, 2)))
    else:
        number, _, channel, in_bounds = spectrum_elements(sizes, D, first_channel, TILE, TILE.BLOCK_D)
        real = tl.load(weight + number * D + channel, mask=in_bounds, other=0.0)
        return real, real


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def spectral_filtered_kernel(
    x,  # [B, prefix + H W, D], unit stride in D
    weight,  # float32 [H, K, D], or [H, K, D, 2] if FOURIER
    out,  # [B, prefix + H W, D]
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
    H, W, _, _ = sizes
    first_channel = tl.program_id(0) * TILE.BLOCK_D
    matrices = load_matrices(matrix_h, matrix_w, sizes, strides, TILE)
    weight_real, weight_imaginary = _load_weights(weight, sizes, D, first_channel, TILE)
    token, channel, in_bounds = point_elements(sizes, D, first_channel, TILE)
    for b in range(tl.program_id(1), B, tl.num_programs(1)):
        tokens = x + b.to(tl.int64) * stride_batch
        result = out + b.to(tl.int64) * (prefix + H * W) * D
        copy_prefix(tokens, result, stride_token, prefix, D, first_channel, True, TILE.BLOCK_D)
        at = tokens + (prefix + token).to(tl.int64) * stride_token + channel
        points = tl.load(at, mask=in_bounds, other=0.0).to(tl.float32)
        real, imaginary = spectrum_of(points, matrices, TILE)
        product = real * weight_real
        if TILE.FOURIER:
            product -= imaginary * weight_imaginary
            imaginary = real * weight_imaginary + imaginary * weight_real
        points = points_of(product, imaginary, matrices, TILE)
        to = result + (prefix + token).to(tl.int64) * D + channel
        tl.store(to, points.to(out.dtype.element_ty), mask=in_bounds)


def filtered(
    x: Tensor, weight: Tensor, matrix_h: Tensor | None, matrix_w: Tensor, height: int, width: int, prefix_tokens: int
) -> Tensor:
    """``mlip_kernels::spectral_filtered`` on CUDA tensors."""
    fourier = weight.dim() == 4
    sizes = (height, width, height, matrix_w.shape[0] // (1 + fourier))
    out = x.new_empty(x.shape)
    if not fits(matrix_h, sizes):
        transform = OrthonormalAxes(matrix_h, matrix_w, width, fourier, exact=x.dtype != torch.bfloat16)
        parts = transform.spectrum(as_grid(x, height, width, prefix_tokens))
        out[:, :prefix_tokens] = x[:, :prefix_tokens]
        transform.inverse(_weighted(parts, weight), as_grid(out, height, width, prefix_tokens))
    elif out.numel():
        x = with_unit_stride(x)
        arguments = launch_arguments(x, matrix_h, matrix_w, sizes, prefix_tokens, fourier=fourier)
        spectral_filtered_kernel[choose_grid(arguments)](x, weight.contiguous(), out, **arguments)
    return out


def _weighted(parts: Sequence[Tensor], weight: Tensor) -> Sequence[Tensor]:
    if weight.dim() == 3:
        return (parts[0] * weight,)
    (real, imaginary), (weight_real, weight_imaginary) = parts, weight.unbind(-1)
    return (
        real * weight_real - imaginary * weight_imaginary,
        real * weight_imaginary + imaginary * weight_real,
    )


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def spectral_filtered_backward_weight_kernel(
    grad,  # [B, prefix + H W, D], unit stride in D
    x,  # [B, prefix + H W, D], unit stride in D
    partial,  # float32 [splits, H, K, D], or [splits, H, K, D, 2] if FOURIER
    matrix_h,
    matrix_w,
    sizes,
    strides,
    B,
    D,
    prefix,
    grad_stride_batch,
    grad_stride_token,
    stride_batch,
    stride_token,
    TILE: tl.constexpr,
):
    _, W, R, K = sizes
    first_channel = tl.program_id(0) * TILE.BLOCK_D
    split = tl.program_id(1)
    matrices = load_matrices(matrix_h, matrix_w, sizes, strides, TILE)
    token, channel, in_bounds = point_elements(sizes, D, first_channel, TILE)
    sum_real = tl.zeros((TILE.ROWS, TILE.COLUMNS * TILE.BLOCK_D), tl.float32)
    sum_imaginary = sum_real
    for b in range(split, B, tl.num_programs(1)):
        rows = (prefix + token).to(tl.int64)
        at = b.to(tl.int64) * stride_batch + rows * stride_token + channel
        points = tl.load(x + at, mask=in_bounds, other=0.0).to(tl.float32)
        x_real, x_imaginary = spectrum_of(points, matrices, TILE)
        at = b.to(tl.int64) * grad_stride_batch + rows * grad_stride_token + channel
        points = tl.load(grad + at, mask=in_bounds, other=0.0).to(tl.float32)
        real, imaginary = spectrum_of(points, matrices, TILE)
        sum_real += real * x_real
        if TILE.FOURIER:
            sum_real += imaginary * x_imaginary
            sum_imaginary += imaginary * x_real - real * x_imaginary
    if TILE.FOURIER:
        # Real and imaginary part lie together: as twice as many channels they are written in one access.
        pairs = tl.reshape(tl.join(sum_real, sum_imaginary), (TILE.ROWS, TILE.COLUMNS * TILE.BLOCK_D * 2))
        number, frequency, to_channel, to_in_bounds = spectrum_elements(
            sizes, 2 * D, 2 * first_channel, TILE, 2 * TILE.BLOCK_D
        )
        to = partial + (split.to(tl.int64) * R * K + number) * 2 * D + to_channel
        tl.store(to, pairs * multiplicity(frequency, W, TILE), mask=to_in_bounds)
    else:
        number, _, to_channel, to_in_bounds = spectrum_elements(sizes, D, first_channel, TILE, TILE.BLOCK_D)
        to = partial + (split.to(tl.int64) * R * K + number) * D + to_channel
        tl.store(to, sum_real, mask=to_in_bounds)


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
    matrix_h: Tensor | None,
    matrix_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
    fourier: bool,
) -> Tensor:
    """``mlip_kernels::spectral_filtered_backward_weight`` on CUDA tensors."""
    sizes = (height, width, height, matrix_w.shape[0] // (1 + fourier))
    if not fits(matrix_h, sizes):
        transform = OrthonormalAxes(matrix_h, matrix_w, width, fourier, exact=True)
        g, tokens = (transform.spectrum(as_grid(t, height, width, prefix_tokens)) for t in (grad, x))
        if not fourier:
            return (g[0] * tokens[0]).sum(0)
        real = (g[0] * tokens[0] + g[1] * tokens[1]).sum(0)
        imaginary = (g[1] * tokens[0] - g[0] * tokens[1]).sum(0)
        return torch.stack((real, imaginary), -1) * transform.count[..., None]
    grad_weight = matrix_w.new_empty(height, sizes[3], x.shape[2], *([2] if fourier else []))
    if grad_weight.numel() == 0 or x.shape[0] == 0:
        return grad_weight.zero_()
    grad, x = with_unit_stride(grad), with_unit_stride(x)
    crowded = x.element_size() == 4
    arguments = launch_arguments(
        x, matrix_h, matrix_w, sizes, prefix_tokens, fourier=fourier, exact=True, crowded=crowded
    )
    columns = triton.cdiv(x.shape[2], arguments["TILE"].BLOCK_D)
    splits = parts_of(x.shape[0], min(BLOCKS_WANTED // triton.cdiv(x.shape[2], 32), MOST_SPLITS))
    partial = grad_weight if splits == 1 else grad_weight.new_empty(splits, *grad_weight.shape)
    strides = {"grad_stride_batch": grad.stride(0), "grad_stride_token": grad.stride(1)}
    spectral_filtered_backward_weight_kernel[columns, splits](grad, x, partial, **strides, **arguments)
    if splits > 1:
        count = grad_weight.numel()
        spectral_filtered_backward_weight_finish_kernel[(triton.cdiv(count, FINISH_BLOCK),)](
            partial, grad_weight, count, splits, BLOCK=FINISH_BLOCK
        )
    return grad_weight


class OrthonormalAxes:
    """An orthonormal transform, cosine or Fourier, one axis after another; the spectrum is float32, in memory."""

    def __init__(self, matrix_h: Tensor | None, matrix_w: Tensor, width: int, fourier: bool, *, exact: bool) -> None:
        self.matrix_h = real_matrix(matrix_h) if fourier else matrix_h
        self.matrix_w, self.fourier, self.exact = matrix_w, fourier, exact
        if fourier:  # how many coefficients each of half a spectrum stands for, as `multiplicity`
            self.count = matrix_w.new_full((width // 2 + 1, 1), 2.0)
            self.count[0] = 1.0
            if width % 2 == 0:
                self.count[-1] = 1.0

    def spectrum(self, tokens: Tensor) -> Sequence[Tensor]:
        """The coefficients of ``[B, H, W, D]``: ``[B, H, K, D]``, real and imaginary part if Fourier."""
        batch, height, _, channels = tokens.shape
        parts = 1 + self.fourier
        out = self.matrix_w.new_empty(parts, batch, height, self.matrix_w.shape[0] // parts, channels)
        return transform_axes(tokens, self.matrix_h, self.matrix_w, out, self.exact).unbind()

    def inverse(self, parts: Sequence[Tensor], out: Tensor) -> Tensor:
        """The tokens of a spectrum, mirror images counted, into ``out [B, H, W, D]``."""
        matrix_h = None if self.matrix_h is None else self.matrix_h.t()
        if self.fourier:
            real, imaginary = (part * self.count for part in parts)
            return synthesize_axes(real, imaginary, matrix_h, self.matrix_w.t(), out, self.exact)
        transform_axes(parts[0], matrix_h, self.matrix_w.t(), out[None], self.exact)
        return out
