"""Energy of tokens in bands of frequencies, and energy of each token in some of the frequencies.

    band_energy     squared coefficients, summed over those of each band: bands [coefficients] int32, the band of each
                    e = sum_c m_c |z_c|^2       dx = 2 F^* (m g z)      z = F x with the transform F of filter.py
    token_energy    P x, squared and summed over channels, where the projection P keeps some coefficients and makes
                    tokens of them: frequency_mask [coefficients] float32, 1 or 0
                    e_n = sum_d (P x)_nd^2      dx = 2 P (g P x)

    x, dx [B, prefix + H W, D] float32, float16 or bfloat16; dx is 0 for the prefix
    e, g  [B, bands, D] as x, of tokens [B, prefix + H W] float32, 0 for the prefix
    m     in a Fourier transform a coefficient with a mirror image counts twice

    kernel                   reads                          writes                    flops, in transforms
    band_energy              B H W D x                      B bands D e               1
    band_energy_backward     B H W D x, B bands D g         B (prefix + H W) D dx     2
    token_energy             B H W D x                      parts B H W partial sums  2
    token_energy_finish      parts B H W partial sums       B (prefix + H W) e        0
    token_energy_backward    B H W D x, B H W g             B (prefix + H W) D dx     4

One pass over the tokens each, bound by memory; tiles.py says how work is split. For each band a program sums the powers
in that band, or gives the gradient of the band to its coefficients. token_energy: a program owns a batch element and
every parts-th block of channels, and adds their squares in registers; finish adds the partial sums in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.spectral.plain import band_members
from mlip_kernels.triton import with_unit_stride
from mlip_kernels.triton.spectral.filter import OrthonormalAxes
from mlip_kernels.triton.spectral.tiles import (
    NOT_SPECIALIZED,
    as_grid,
    choose_grid,
    copy_prefix,
    fits,
    launch_arguments,
    load_matrices,
    load_per_coefficient,
    multiplicity,
    multiply_axis,
    over_channels,
    point_elements,
    points_of,
    spectrum_elements,
    spectrum_of,
)

CHANNELS_OF_PART = 32  # at least, so that a part is worth its partial sums
PROGRAMS_WANTED = 528  # a few for each multiprocessor of a large GPU
FINISH_BLOCK = 256


# --- bands -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=(*NOT_SPECIALIZED, "count"))
def spectral_band_energy_kernel(
    x,  # [B, prefix + H W, D], unit stride in D
    bands,  # int32 [R K]
    energy,  # [B, count, D]
    matrix_h,
    matrix_w,
    sizes,
    strides,
    count,
    B,
    D,
    prefix,
    stride_batch,
    stride_token,
    TILE: tl.constexpr,
):
    _, W, _, _ = sizes
    first_channel = tl.program_id(0) * TILE.BLOCK_D
    matrices = load_matrices(matrix_h, matrix_w, sizes, strides, TILE)
    token, channel, in_bounds = point_elements(sizes, D, first_channel, TILE)
    _, frequency, _, _ = spectrum_elements(sizes, D, first_channel, TILE, TILE.BLOCK_D)
    band_of = load_per_coefficient(bands, sizes, -1, TILE)
    to_channel = first_channel + tl.arange(0, TILE.BLOCK_D)
    for b in range(tl.program_id(1), B, tl.num_programs(1)):
        rows = (prefix + token).to(tl.int64)
        tokens = x + b.to(tl.int64) * stride_batch
        points = tl.load(tokens + rows * stride_token + channel, mask=in_bounds, other=0.0).to(tl.float32)
        real, imaginary = spectrum_of(points, matrices, TILE)
        power = real * real
        if TILE.FOURIER:
            power = (power + imaginary * imaginary) * multiplicity(frequency, W, TILE)
        for band in range(0, count):
            members = tl.reshape(tl.where(band_of == band, power, 0.0), (TILE.ROWS * TILE.COLUMNS, TILE.BLOCK_D))
            to = energy + (b.to(tl.int64) * count + band) * D + to_channel
            tl.store(to, tl.sum(members, 0).to(energy.dtype.element_ty), mask=to_channel < D)


def band_energy(
    x: Tensor,
    bands: Tensor,
    count: int,
    matrix_h: Tensor | None,
    matrix_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
    fourier: bool,
) -> Tensor:
    """``mlip_kernels::spectral_band_energy`` on CUDA tensors."""
    sizes = (height, width, height, matrix_w.shape[0] // (1 + fourier))
    energy = x.new_empty(x.shape[0], count, x.shape[2])
    if not fits(matrix_h, sizes):
        transform = OrthonormalAxes(matrix_h, matrix_w, width, fourier, exact=x.dtype != torch.bfloat16)
        power = sum(part.square() for part in transform.spectrum(as_grid(x, height, width, prefix_tokens)))
        members = band_members(bands, count, height, width, matrix_w, fourier)
        multiply_axis(members, power.flatten(1, 2).unsqueeze(1), energy.unsqueeze(1), exact=True)
    elif energy.numel():
        x = with_unit_stride(x)
        arguments = launch_arguments(x, matrix_h, matrix_w, sizes, prefix_tokens, fourier=fourier)
        spectral_band_energy_kernel[choose_grid(arguments)](x, bands.contiguous(), energy, count=count, **arguments)
    return energy


@triton.jit(do_not_specialize=(*NOT_SPECIALIZED, "count"))
def spectral_band_energy_backward_kernel(
    grad,  # [B, count, D]
    x,  # [B, prefix + H W, D], unit stride in D
    bands,  # int32 [R K]
    grad_x,  # [B, prefix + H W, D]
    matrix_h,
    matrix_w,
    sizes,
    strides,
    count,
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
    token, channel, in_bounds = point_elements(sizes, D, first_channel, TILE)
    _, frequency, _, _ = spectrum_elements(sizes, D, first_channel, TILE, TILE.BLOCK_D)
    band_of = load_per_coefficient(bands, sizes, -1, TILE)
    from_channel = first_channel + tl.arange(0, TILE.COLUMNS * TILE.BLOCK_D) % TILE.BLOCK_D
    for b in range(tl.program_id(1), B, tl.num_programs(1)):
        result = grad_x + b.to(tl.int64) * (prefix + H * W) * D
        copy_prefix(result, result, D, prefix, D, first_channel, False, TILE.BLOCK_D)
        rows = (prefix + token).to(tl.int64)
        tokens = x + b.to(tl.int64) * stride_batch
        points = tl.load(tokens + rows * stride_token + channel, mask=in_bounds, other=0.0).to(tl.float32)
        real, imaginary = spectrum_of(points, matrices, TILE)
        factor = tl.zeros((TILE.ROWS, TILE.COLUMNS * TILE.BLOCK_D), tl.float32)
        for band in range(0, count):
            at = grad + (b.to(tl.int64) * count + band) * D + from_channel
            of_band = tl.load(at, mask=from_channel < D, other=0.0).to(tl.float32)
            factor = tl.where(band_of == band, of_band[None, :], factor)
        factor *= 2.0 * multiplicity(frequency, W, TILE)
        real *= factor
        if TILE.FOURIER:
            imaginary *= factor
        points = points_of(real, imaginary, matrices, TILE)
        tl.store(result + rows * D + channel, points.to(grad_x.dtype.element_ty), mask=in_bounds)


def band_energy_backward(
    grad: Tensor,
    x: Tensor,
    bands: Tensor,
    matrix_h: Tensor | None,
    matrix_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
    fourier: bool,
) -> Tensor:
    """``mlip_kernels::spectral_band_energy_backward`` on CUDA tensors."""
    sizes = (height, width, height, matrix_w.shape[0] // (1 + fourier))
    grad_x = x.new_empty(x.shape)
    if not fits(matrix_h, sizes):
        transform = OrthonormalAxes(matrix_h, matrix_w, width, fourier, exact=x.dtype != torch.bfloat16)
        in_a_band = (bands >= 0) & (bands < grad.shape[1])
        factor = 2 * grad.float().index_select(1, bands.clamp(0, grad.shape[1] - 1)) * in_a_band[:, None]
        parts = transform.spectrum(as_grid(x, height, width, prefix_tokens))
        parts = [part * factor.reshape(part.shape) for part in parts]
        grad_x[:, :prefix_tokens] = 0
        transform.inverse(parts, as_grid(grad_x, height, width, prefix_tokens))
    elif grad_x.numel():
        x = with_unit_stride(x)
        arguments = launch_arguments(x, matrix_h, matrix_w, sizes, prefix_tokens, fourier=fourier)
        spectral_band_energy_backward_kernel[choose_grid(arguments)](
            grad.contiguous(), x, bands.contiguous(), grad_x, count=grad.shape[1], **arguments
        )
    return grad_x


# --- tokens ----------------------------------------------------------------------------------------------------------


@triton.jit
def _load_frequency_mask(frequency_mask, sizes, TILE: tl.constexpr):
    """The factor of each element of a spectrum, times its multiplicity."""
    _, W, _, _ = sizes
    _, frequency, _, _ = spectrum_elements(sizes, TILE.BLOCK_D, 0, TILE, TILE.BLOCK_D)
    factor = load_per_coefficient(frequency_mask, sizes, 0.0, TILE)
    return factor * multiplicity(frequency, W, TILE)


@triton.jit
def _project(points, factor, matrices, TILE: tl.constexpr):
    """The points that the coefficients in the frequency mask make."""
    real, imaginary = spectrum_of(points, matrices, TILE)
    real *= factor
    if TILE.FOURIER:
        imaginary *= factor
    return points_of(real, imaginary, matrices, TILE)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def spectral_token_energy_kernel(
    x,  # [B, prefix + H W, D], unit stride in D
    frequency_mask,  # float32 [R K]
    partial,  # float32 [parts, B, H W]
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
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    matrices = load_matrices(matrix_h, matrix_w, sizes, strides, TILE)
    factor = _load_frequency_mask(frequency_mask, sizes, TILE)
    energy = tl.zeros((TILE.WIDTH, TILE.HEIGHT), tl.float32)
    for first_channel in range(part * TILE.BLOCK_D, D, tl.num_programs(1) * TILE.BLOCK_D):
        token, channel, in_bounds = point_elements(sizes, D, first_channel, TILE)
        at = b * stride_batch + (prefix + token).to(tl.int64) * stride_token + channel
        points = tl.load(x + at, mask=in_bounds, other=0.0).to(tl.float32)
        points = _project(points, factor, matrices, TILE)
        energy += tl.sum(tl.reshape(points * points, (TILE.WIDTH, TILE.HEIGHT, TILE.BLOCK_D)), 2)
    w = tl.arange(0, TILE.WIDTH)[:, None]
    h = tl.arange(0, TILE.HEIGHT)[None, :]
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
    in_bounds = (n >= prefix) & (n < prefix + count)
    for part in range(0, parts):
        total += tl.load(partial + (part * B + b) * count + n - prefix, mask=in_bounds, other=0.0)
    tl.store(energy + b * (prefix + count) + n, total, mask=n < prefix + count)


def token_energy(
    x: Tensor,
    frequency_mask: Tensor,
    matrix_h: Tensor | None,
    matrix_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
) -> Tensor:
    """``mlip_kernels::spectral_token_energy`` on CUDA tensors."""
    fourier = frequency_mask.dim() == 3
    sizes = (height, width, height, matrix_w.shape[0] // (1 + fourier))
    if not fits(matrix_h, sizes):
        transform = OrthonormalAxes(matrix_h, matrix_w, width, fourier, exact=True)
        high = _project_axes(transform, as_grid(x, height, width, prefix_tokens), frequency_mask)
        return torch.nn.functional.pad(high.square().sum(-1).flatten(1), (prefix_tokens, 0))
    energy = matrix_w.new_empty(x.shape[:2])
    if energy.numel():
        x = with_unit_stride(x)
        arguments = launch_arguments(x, matrix_h, matrix_w, sizes, prefix_tokens, fourier=fourier, exact=True)
        batch, count = x.shape[0], height * width
        parts = min(triton.cdiv(x.shape[2], CHANNELS_OF_PART), triton.cdiv(PROGRAMS_WANTED, batch))
        partial = energy.new_empty(parts, batch, count)
        spectral_token_energy_kernel[batch, parts](x, frequency_mask.contiguous(), partial, **arguments)
        spectral_token_energy_finish_kernel[batch, triton.cdiv(energy.shape[1], FINISH_BLOCK)](
            partial, energy, parts, batch, count, prefix_tokens, BLOCK=FINISH_BLOCK
        )
    return energy


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def spectral_token_energy_backward_kernel(
    grad,  # float32 [B, prefix + H W]
    x,  # [B, prefix + H W, D], unit stride in D
    frequency_mask,  # float32 [R K]
    grad_x,  # [B, prefix + H W, D]
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
    factor = _load_frequency_mask(frequency_mask, sizes, TILE)
    token, channel, in_bounds = point_elements(sizes, D, first_channel, TILE)
    w = tl.arange(0, TILE.WIDTH)[:, None]
    h = tl.arange(0, TILE.HEIGHT)[None, :]
    for b in range(tl.program_id(1), B, tl.num_programs(1)):
        result = grad_x + b.to(tl.int64) * (prefix + H * W) * D
        copy_prefix(result, result, D, prefix, D, first_channel, False, TILE.BLOCK_D)
        rows = (prefix + token).to(tl.int64)
        tokens = x + b.to(tl.int64) * stride_batch
        points = tl.load(tokens + rows * stride_token + channel, mask=in_bounds, other=0.0).to(tl.float32)
        points = _project(points, factor, matrices, TILE)
        energies = grad + b.to(tl.int64) * (prefix + H * W) + prefix
        energy = tl.load(energies + h * W + w, mask=(w < W) & (h < H), other=0.0)
        points *= over_channels(2.0 * energy, TILE.BLOCK_D)
        points = _project(points, factor, matrices, TILE)
        tl.store(result + rows * D + channel, points.to(grad_x.dtype.element_ty), mask=in_bounds)


def token_energy_backward(
    grad: Tensor,
    x: Tensor,
    frequency_mask: Tensor,
    matrix_h: Tensor | None,
    matrix_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
) -> Tensor:
    """``mlip_kernels::spectral_token_energy_backward`` on CUDA tensors."""
    fourier = frequency_mask.dim() == 3
    sizes = (height, width, height, matrix_w.shape[0] // (1 + fourier))
    grad_x = x.new_empty(x.shape)
    if not fits(matrix_h, sizes):
        transform = OrthonormalAxes(matrix_h, matrix_w, width, fourier, exact=x.dtype != torch.bfloat16)
        high = _project_axes(transform, as_grid(x, height, width, prefix_tokens), frequency_mask)
        high *= 2 * grad[:, prefix_tokens:].reshape(*high.shape[:3], 1)
        grad_x[:, :prefix_tokens] = 0
        _project_axes(transform, high, frequency_mask, as_grid(grad_x, height, width, prefix_tokens))
    elif grad_x.numel():
        x = with_unit_stride(x)
        arguments = launch_arguments(x, matrix_h, matrix_w, sizes, prefix_tokens, fourier=fourier, crowded=fourier)
        spectral_token_energy_backward_kernel[choose_grid(arguments)](
            grad.contiguous(), x, frequency_mask.contiguous(), grad_x, **arguments
        )
    return grad_x


def _project_axes(
    transform: OrthonormalAxes, tokens: Tensor, frequency_mask: Tensor, out: Tensor | None = None
) -> Tensor:
    """The tokens ``[B, H, W, D]`` that the coefficients in the frequency mask make, by default float32."""
    factor = frequency_mask if transform.fourier else frequency_mask[..., None]
    parts = [part * factor for part in transform.spectrum(tokens)]
    return transform.inverse(parts, frequency_mask.new_empty(tokens.shape) if out is None else out)
