"""The engine of the spectral family: a linear transform along each axis of a grid of tokens, for every channel.

    Z = A_h X A_w^T, real (cosine) or complex (Fourier); the token axis is a grid of one row, without A_h

A batch element that fits the registers is one tile of BLOCK_D channels: one read, both products of a transform in
registers, one write. Larger ones take one axis after another, with their spectrum in memory: `transform_axes`.

    points    [WIDTH, (HEIGHT, BLOCK_D)]    a row of the grid is a column of the tile, so that matrix_w multiplies it
    spectrum  [ROWS, (COLUMNS, BLOCK_D)]    transposed, so that matrix_h multiplies it

Sizes in capitals are powers of two that the grid fills in part; the rest is masked, and 0. In a cosine transform the
imaginary part is another name of the real one. Every kernel of tiles takes

    sizes        (H, W, R, K): points of the grid, rows and columns of the spectrum; H = R = 1 on the token axis
    matrix_h     [R, H], in a Fourier transform [2, R, H], real and imaginary part; anything on the token axis
    matrix_w     [K, W], in a Fourier transform [2 K, W], real parts over imaginary parts
    strides      of matrix_h (part, row, column) and of matrix_w (row, column), in elements
    TILE         what the kernel is compiled for: `Tile`

A program owns BLOCK_D channels and every splits-th batch element, so that it reads matrices and weights once for all of
them. There are as many programs as the GPU holds at once: with more, the later ones would only read all that again.
What changes sums, and so their last bits, depends on shapes and dtypes alone: results are the same on every GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.triton import with_unit_stride
from mlip_kernels.triton.launch import next_power_of_2

LARGEST_GRID = 32  # points or coefficients along an axis of a grid that is a tile
LARGEST_AXIS = 64  # points or coefficients of a token axis that is a tile
RESIDENT = 2  # programs on a multiprocessor at once: their registers allow one to three
NOT_SPECIALIZED = ("B", "prefix")  # or each size could compile the kernel anew
AXIS_M, AXIS_I, AXIS_K = 64, 64, 16  # rows, columns and depth of a tile of `spectral_axis_kernel`

# --- products of float32 matrices ------------------------------------------------------------------------------------


@triton.jit
def _split(value):
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def multiply(matrix, data, sums, EXACT: tl.constexpr):
    """``sums + matrix @ data`` on tensor cores, as accurate as float32, for float32 [M, K], [K, N] and [M, N].

    bfloat16 has 8 of float32's 24 bits and all of its range, so a float is the sum of three of them: high + middle +
    low. Six of the nine products of parts are computed, the others are below the rounding of float32. That takes as
    many tensor-core instructions as three products in TF32, and has two bits more. Without EXACT, for data in bfloat16
    (8 bits), the three largest remain, with a relative error of 2^-16.

    Small products are added first: an accumulator of the tensor cores rounds towards zero at each addition.
    """
    matrix_high, matrix_middle, matrix_low = _split(matrix)
    data_high, data_middle, data_low = _split(data)
    if EXACT:
        sums = tl.dot(matrix_low, data_high, sums)
        sums = tl.dot(matrix_high, data_low, sums)
        sums = tl.dot(matrix_middle, data_middle, sums)
    sums = tl.dot(matrix_middle, data_high, sums)
    sums = tl.dot(matrix_high, data_middle, sums)
    return tl.dot(matrix_high, data_high, sums)


# --- launches --------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """What a kernel is compiled for."""

    FOURIER: bool  # whether the transform is complex
    GRID: bool  # rather than the token axis, where HEIGHT = COLUMNS = 1
    EXACT: bool  # whether products are as accurate as float32
    HEIGHT: int
    WIDTH: int
    ROWS: int
    COLUMNS: int
    BLOCK_D: int


def fits(matrix_h: Tensor | None, sizes: tuple[int, int, int, int]) -> bool:
    """Whether a batch element is one tile."""
    return max(sizes) <= (LARGEST_AXIS if matrix_h is None else LARGEST_GRID)


def launch_arguments(
    x: Tensor,
    matrix_h: Tensor | None,
    matrix_w: Tensor,
    sizes: tuple[int, int, int, int],
    prefix_tokens: int,
    *,
    fourier: bool,
    exact: bool | None = None,
    crowded: bool = False,
) -> dict[str, Any]:
    """The arguments that kernels share, by name.

    Args:
        x: tokens ``[B, N, D]``, whose strides are then among the arguments, or half a spectrum ``[B, R, K, D]``.
        sizes: H, W, R, K, of a transform that `fits`.
        exact: whether products are as accurate as float32; by default unless x is bfloat16.
        crowded: whether the kernel keeps more than one spectrum in registers.
    """
    _, W, _, K = sizes
    h = matrix_w if matrix_h is None else matrix_h
    exact = x.dtype != torch.bfloat16 if exact is None else exact
    height, width, rows, columns = (1, _padded(W), _padded(K), 1) if matrix_h is None else map(_padded, sizes)
    block_d = 16
    if matrix_h is not None:  # as many channels as fit the registers; at least 16 bytes of each row in float32
        large, unaligned = max(height, width, rows, columns) > 16, x.shape[-1] % 4 != 0
        block_d //= (1 + (large or unaligned or crowded)) * (1 + (large and (crowded or (fourier and exact))))
    strides_of_tokens = {"stride_batch": x.stride(0), "stride_token": x.stride(1)} if x.dim() == 3 else {}
    return {
        "matrix_h": h,
        "matrix_w": matrix_w,
        "sizes": sizes,
        "strides": (h.stride(0) if h.dim() == 3 else 0, h.stride(-2), h.stride(-1), *matrix_w.stride()),
        "B": x.shape[0],
        "D": x.shape[-1],
        "prefix": prefix_tokens,
        **strides_of_tokens,
        "TILE": Tile(fourier, matrix_h is not None, exact, height, width, rows, columns, block_d),
        "num_warps": 4 if matrix_h is None else 8,
        "maxnreg": 255,  # all there are, rather than a few spills for the sake of one more block
    }


def choose_grid(arguments: dict[str, Any]) -> tuple[int, int]:
    """Programs side by side, and programs that share the batch on the current GPU."""
    driver = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(driver.get_current_device())
    columns = triton.cdiv(arguments["D"], arguments["TILE"].BLOCK_D)
    return columns, parts_of(arguments["B"], RESIDENT * properties["multiprocessor_count"] // columns)


def parts_of(batch: int, wanted: int) -> int:
    """At most ``wanted`` parts of the batch, and no more than it takes for the longest of them."""
    longest = triton.cdiv(batch, max(1, wanted))
    return triton.cdiv(batch, longest)


def _padded(size: int) -> int:
    return max(16, next_power_of_2(size))


# --- tiles: matrices and elements ------------------------------------------------------------------------------------


@triton.jit
def _load_matrix(
    data,  # float32 [rows, columns]
    rows,
    columns,
    stride_row,
    stride_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    in_bounds = (row < rows) & (column < columns)
    return tl.load(data + row * stride_row + column * stride_column, mask=in_bounds, other=0.0)


@triton.jit
def load_matrices(matrix_h, matrix_w, sizes, strides, TILE: tl.constexpr):
    """Real and imaginary part of matrix_w and, on a grid, of matrix_h; a program reads them once."""
    H, W, R, K = sizes
    h_part, h_row, h_column, w_row, w_column = strides
    FREQUENCIES: tl.constexpr = TILE.COLUMNS if TILE.GRID else TILE.ROWS
    w_real = _load_matrix(matrix_w, K, W, w_row, w_column, FREQUENCIES, TILE.WIDTH)
    w_imaginary = w_real
    if TILE.FOURIER:
        w_imaginary = _load_matrix(matrix_w + K * w_row, K, W, w_row, w_column, FREQUENCIES, TILE.WIDTH)
    h_real, h_imaginary = w_real, w_imaginary
    if TILE.GRID:
        h_real = _load_matrix(matrix_h, R, H, h_row, h_column, TILE.ROWS, TILE.HEIGHT)
        h_imaginary = h_real
        if TILE.FOURIER:
            h_imaginary = _load_matrix(matrix_h + h_part, R, H, h_row, h_column, TILE.ROWS, TILE.HEIGHT)
    return w_real, w_imaginary, h_real, h_imaginary


@triton.jit
def point_elements(sizes, D, first_channel, TILE: tl.constexpr):
    """Token behind the prefix, channel and mask of each element of a tile of points."""
    H, W, _, _ = sizes
    w = tl.arange(0, TILE.WIDTH)[:, None]
    column = tl.arange(0, TILE.HEIGHT * TILE.BLOCK_D)[None, :]
    h, channel = column // TILE.BLOCK_D, first_channel + column % TILE.BLOCK_D
    return h * W + w, channel, (w < W) & (h < H) & (channel < D)


@triton.jit
def spectrum_elements(sizes, D, first_channel, TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Number, frequency along W, channel and mask of each element of a tile of coefficients."""
    _, _, R, K = sizes
    row = tl.arange(0, TILE.ROWS)[:, None]
    column = tl.arange(0, TILE.COLUMNS * BLOCK_D)[None, :]
    frequency, channel = column // BLOCK_D, first_channel + column % BLOCK_D
    if TILE.GRID:
        in_bounds = (row < R) & (frequency < K) & (channel < D)
        return (row * K + frequency).to(tl.int64), frequency, channel, in_bounds
    else:
        return row.to(tl.int64), row, channel, (row < K) & (channel < D)


@triton.jit
def over_channels(value, BLOCK_D: tl.constexpr):
    """[FIRST, SECOND] as [FIRST, (SECOND, BLOCK_D)], the same for every channel."""
    FIRST: tl.constexpr = value.shape[0]
    SECOND: tl.constexpr = value.shape[1]
    cube = tl.broadcast_to(tl.expand_dims(value, 2), (FIRST, SECOND, BLOCK_D))
    return tl.reshape(cube, (FIRST, SECOND * BLOCK_D))


@triton.jit
def load_per_coefficient(data, sizes, other, TILE: tl.constexpr):
    """Entries of a table ``data [R K]`` for the elements of a spectrum, ``other`` where there is no coefficient."""
    number, _, _, in_bounds = spectrum_elements(sizes, 1, 0, TILE, 1)
    return over_channels(tl.load(data + number, mask=in_bounds, other=other), TILE.BLOCK_D)


@triton.jit
def multiplicity(frequency, W, TILE: tl.constexpr):
    """How many coefficients of the whole spectrum each stands for: those of half a spectrum have a mirror image."""
    own_image = (frequency == 0) | (2 * frequency == W)
    return tl.where(own_image | (not TILE.FOURIER), 1.0, 2.0)


@triton.jit
def copy_prefix(
    x,  # first token of a batch element, unit stride in D
    out,  # first token of a batch element, contiguous
    stride_token,
    prefix,
    D,
    first_channel,
    COPY: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy the prefix tokens, or set them to 0."""
    channel = first_channel + tl.arange(0, BLOCK_D)
    for n in range(0, prefix):
        value = tl.zeros((BLOCK_D,), out.dtype.element_ty)
        if COPY:
            value = tl.load(x + n.to(tl.int64) * stride_token + channel, mask=channel < D, other=0.0)
        tl.store(out + n.to(tl.int64) * D + channel, value, mask=channel < D)


# --- tiles: transforms -----------------------------------------------------------------------------------------------


@triton.jit
def _transposed(value, FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK_D: tl.constexpr):
    """[FIRST, (SECOND, BLOCK_D)] as [SECOND, (FIRST, BLOCK_D)]."""
    cube = tl.permute(tl.reshape(value, (FIRST, SECOND, BLOCK_D)), (1, 0, 2))
    return tl.reshape(cube, (SECOND, FIRST * BLOCK_D))


@triton.jit
def spectrum_of(points, matrices, TILE: tl.constexpr):
    """Real and imaginary part of the spectrum of a tile of points."""
    w_real, w_imaginary, h_real, h_imaginary = matrices
    zeros = tl.zeros((TILE.ROWS, TILE.COLUMNS * TILE.BLOCK_D), tl.float32)
    if TILE.GRID:
        half = tl.zeros((TILE.COLUMNS, TILE.HEIGHT * TILE.BLOCK_D), tl.float32)
        half_real = multiply(w_real, points, half, TILE.EXACT)
        half_real = _transposed(half_real, TILE.COLUMNS, TILE.HEIGHT, TILE.BLOCK_D)
        real = multiply(h_real, half_real, zeros, TILE.EXACT)
        imaginary = real
        if TILE.FOURIER:
            imaginary = multiply(h_imaginary, half_real, zeros, TILE.EXACT)
            half_imaginary = multiply(w_imaginary, points, half, TILE.EXACT)
            half_imaginary = _transposed(half_imaginary, TILE.COLUMNS, TILE.HEIGHT, TILE.BLOCK_D)
            real = multiply(-h_imaginary, half_imaginary, real, TILE.EXACT)
            imaginary = multiply(h_real, half_imaginary, imaginary, TILE.EXACT)
        return real, imaginary
    else:
        real = multiply(w_real, points, zeros, TILE.EXACT)
        imaginary = real
        if TILE.FOURIER:
            imaginary = multiply(w_imaginary, points, zeros, TILE.EXACT)
        return real, imaginary


@triton.jit
def points_of(real, imaginary, matrices, TILE: tl.constexpr):
    """The tile of points that the adjoint of `spectrum_of` makes of a spectrum."""
    w_real, w_imaginary, h_real, h_imaginary = matrices
    points = tl.zeros((TILE.WIDTH, TILE.HEIGHT * TILE.BLOCK_D), tl.float32)
    if TILE.GRID:
        zeros = tl.zeros((TILE.HEIGHT, TILE.COLUMNS * TILE.BLOCK_D), tl.float32)
        half = multiply(tl.trans(h_real), real, zeros, TILE.EXACT)
        if TILE.FOURIER:
            half_imaginary = multiply(tl.trans(-h_imaginary), real, zeros, TILE.EXACT)
            half = multiply(tl.trans(h_imaginary), imaginary, half, TILE.EXACT)
            half_imaginary = multiply(tl.trans(h_real), imaginary, half_imaginary, TILE.EXACT)
            half_imaginary = _transposed(half_imaginary, TILE.HEIGHT, TILE.COLUMNS, TILE.BLOCK_D)
            points = multiply(tl.trans(w_imaginary), half_imaginary, points, TILE.EXACT)
        half = _transposed(half, TILE.HEIGHT, TILE.COLUMNS, TILE.BLOCK_D)
        return multiply(tl.trans(w_real), half, points, TILE.EXACT)
    else:
        if TILE.FOURIER:
            points = multiply(tl.trans(w_imaginary), imaginary, points, TILE.EXACT)
        return multiply(tl.trans(w_real), real, points, TILE.EXACT)


# --- one axis after another ------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("M", "K", "OUTER"))
def spectral_axis_kernel(
    x,  # [B, OUTER, K, INNER], unit stride in INNER
    matrix,  # float32 [M, K]
    out,  # [B, OUTER, M, INNER], unit stride in INNER
    M,
    K,
    INNER,
    OUTER,
    matrix_row,
    matrix_column,
    x_batch,
    x_outer,
    x_point,
    out_batch,
    out_outer,
    out_point,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out[b, o, m, i] = sum_k matrix[m, k] x[b, o, k, i]``, i over the INNER elements behind the axis.

    A program owns BLOCK_M x BLOCK_I elements for one b and o. It adds products in chunks of K, so that the rounding
    towards zero in the tensor cores does not add up. x is read M / BLOCK_M times, all but the first from the L2 cache.
    Dense matrices of a hundred points are bound by the tensor cores: a spectrum that passes through memory costs less
    than one that does not fit the registers.
    """
    inner_blocks = tl.cdiv(INNER, BLOCK_I)
    line = (tl.program_id(0) // inner_blocks).to(tl.int64)
    i = tl.program_id(0) % inner_blocks * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    b, o = line // OUTER, line % OUTER
    points = x + b * x_batch + o * x_outer + i
    zeros = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    total = zeros
    for first in range(0, K, BLOCK_K):
        row = (first + tl.arange(0, BLOCK_K))[:, None]
        data = tl.load(points + row.to(tl.int64) * x_point, mask=(row < K) & (i < INNER), other=0.0).to(tl.float32)
        column = (first + tl.arange(0, BLOCK_K))[None, :]
        at = m * matrix_row + column * matrix_column
        part = tl.load(matrix + at, mask=(m < M) & (column < K), other=0.0)
        total += multiply(part, data, zeros, EXACT)
    to = out + b * out_batch + o * out_outer + m.to(tl.int64) * out_point + i
    tl.store(to, total.to(out.dtype.element_ty), mask=(m < M) & (i < INNER))


def multiply_axis(matrix: Tensor, x: Tensor, out: Tensor, exact: bool) -> Tensor:
    """``out[b, o] = matrix @ x[b, o]``: [B, OUTER, K, INNER] to [B, OUTER, M, INNER], unit stride in INNER."""
    batch, outer, points, inner = x.shape
    if out.numel() == 0:
        return out
    grid = (batch * outer * triton.cdiv(inner, AXIS_I), triton.cdiv(matrix.shape[0], AXIS_M))
    sizes = (matrix.shape[0], points, inner, outer)
    strides = (*matrix.stride(), *x.stride()[:3], *out.stride()[:3])
    blocks = {"BLOCK_M": AXIS_M, "BLOCK_I": AXIS_I, "BLOCK_K": AXIS_K}
    spectral_axis_kernel[grid](x, matrix, out, *sizes, *strides, EXACT=exact, **blocks, num_warps=4, maxnreg=255)
    return out


def as_grid(x: Tensor, height: int, width: int, prefix_tokens: int) -> Tensor:
    """Tokens behind the prefix as a view ``[B, H, W, D]``."""
    return with_unit_stride(x[:, prefix_tokens:]).unflatten(1, (height, width))


def real_matrix(matrix_h: Tensor | None) -> Tensor | None:
    """A complex matrix ``[2, R, H]`` as a real one, ``[2 R, 2 H]``, of real parts over imaginary parts."""
    if matrix_h is None:
        return None
    real, imaginary = matrix_h
    return torch.cat((torch.cat((real, -imaginary), 1), torch.cat((imaginary, real), 1)))


def transform_axes(tokens: Tensor, matrix_h: Tensor | None, matrix_w: Tensor, out: Tensor, exact: bool) -> Tensor:
    """``[B, H, W, D]`` to ``out [parts, B, R, K, D]``, whose rows follow one another.

    One part, or two, real and imaginary; then ``matrix_h`` is a `real_matrix`.
    """
    parts, batch, rows, columns, channels = out.shape
    height = tokens.shape[1]
    half = matrix_w.new_empty(batch, parts, height, columns, channels) if matrix_h is not None else out.transpose(0, 1)
    for part, matrix in enumerate(matrix_w.split(columns)):
        multiply_axis(matrix, tokens, half[:, part], exact)
    if matrix_h is not None:
        half = half.reshape(batch, 1, parts * height, columns * channels)
        for part, matrix in zip(out, matrix_h.split(rows), strict=True):
            multiply_axis(matrix, half, part.flatten(2).unsqueeze(1), exact)
    return out


def synthesize_axes(
    real: Tensor, imaginary: Tensor, matrix_h: Tensor | None, matrix_w: Tensor, out: Tensor, exact: bool
) -> Tensor:
    """``[B, R, K, D]`` twice to ``out [B, H, W, D]``; ``matrix_h [2 H, 2 R]`` is a `real_matrix`."""
    batch, rows, columns, channels = real.shape
    if matrix_h is None:
        half = torch.cat((real, imaginary), 2)
    else:
        spectrum = torch.cat((real, imaginary), 1).reshape(batch, 1, 2 * rows, columns * channels)
        half = matrix_w.new_empty(batch, out.shape[1], 2, columns, channels)
        for part, matrix in enumerate(matrix_h.contiguous().chunk(2)):
            multiply_axis(matrix, spectrum, half[:, :, part].flatten(2).unsqueeze(1), exact)
        half = half.flatten(2, 3)
    return multiply_axis(matrix_w, half, out, exact)
