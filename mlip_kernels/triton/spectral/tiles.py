"""Tokens and spectra as tiles of BLOCK_D channels, and what maps one to the other (device code).

    points    [WIDTH, (HEIGHT, BLOCK_D)]    a row of the grid is a column of the tile, so that along_w multiplies it
    spectrum  [ROWS, (COLUMNS, BLOCK_D)]    turned around, so that along_h multiplies it

A tile is a whole batch element: one read, both products of a map in registers, one write. The token axis is a grid of
one row, with HEIGHT = COLUMNS = 1. Sizes in capitals are powers of two, of which the grid is a part; the rest is
masked, and 0. A Fourier map has a real and an imaginary part of everything; in a cosine map the imaginary part is
another name of the real one. What every kernel is told:

    sizes        (H, W, R, K): points of the grid, rows and columns of the spectrum; H = R = 1 on the token axis
    strides      of along_h [R, H] (part, row, column) and of along_w [K, W] (row, column), in elements
    along_h      real, then imaginary part in a Fourier map; anything on the token axis
    along_w      in a Fourier map the K rows of the imaginary part lie under those of the real part
"""

from __future__ import annotations

import triton
import triton.language as tl

from mlip_kernels.triton.spectral.products import multiply

# --- matrices --------------------------------------------------------------------------------------------------------


@triton.jit
def _whole(
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
    there = (row < rows) & (column < columns)
    return tl.load(data + row * stride_row + column * stride_column, mask=there, other=0.0)


@triton.jit
def read_matrices(
    along_h,
    along_w,
    sizes,
    strides,
    FOURIER: tl.constexpr,
    GRID: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Real and imaginary part of along_w and, on a grid, of along_h; a program reads them once."""
    H, W, R, K = sizes
    h_part, h_row, h_column, w_row, w_column = strides
    FREQUENCIES: tl.constexpr = COLUMNS if GRID else ROWS
    w_real = _whole(along_w, K, W, w_row, w_column, FREQUENCIES, WIDTH)
    w_imaginary = w_real
    if FOURIER:
        w_imaginary = _whole(along_w + K * w_row, K, W, w_row, w_column, FREQUENCIES, WIDTH)
    h_real, h_imaginary = w_real, w_imaginary
    if GRID:
        h_real = _whole(along_h, R, H, h_row, h_column, ROWS, HEIGHT)
        h_imaginary = h_real
        if FOURIER:
            h_imaginary = _whole(along_h + h_part, R, H, h_row, h_column, ROWS, HEIGHT)
    return w_real, w_imaginary, h_real, h_imaginary


# --- elements of tiles -----------------------------------------------------------------------------------------------


@triton.jit
def point_elements(sizes, D, first_channel, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Token behind the prefix, channel and existence of each element of a tile of points."""
    H, W, _, _ = sizes
    w = tl.arange(0, WIDTH)[:, None]
    column = tl.arange(0, HEIGHT * BLOCK_D)[None, :]
    h, channel = column // BLOCK_D, first_channel + column % BLOCK_D
    return h * W + w, channel, (w < W) & (h < H) & (channel < D)


@triton.jit
def spectrum_elements(
    sizes,
    D,
    first_channel,
    GRID: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Number, frequency along W, channel and existence of each element of a tile of coefficients."""
    _, _, R, K = sizes
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS * BLOCK_D)[None, :]
    frequency, channel = column // BLOCK_D, first_channel + column % BLOCK_D
    if GRID:
        there = (row < R) & (frequency < K) & (channel < D)
        return (row * K + frequency).to(tl.int64), frequency, channel, there
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
def of_coefficients(
    data,  # [R K]
    sizes,
    other,  # what stands where there is no coefficient
    GRID: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What a table has for the coefficient of each element of a spectrum."""
    number, _, _, there = spectrum_elements(sizes, 1, 0, GRID, ROWS, COLUMNS, 1)
    return over_channels(tl.load(data + number, mask=there, other=other), BLOCK_D)


@triton.jit
def multiplicity(frequency, W, FOURIER: tl.constexpr):
    """How many coefficients of the whole spectrum each stands for: those of half a spectrum have a mirror image."""
    own_image = (frequency == 0) | (2 * frequency == W)
    return tl.where(own_image | (not FOURIER), 1.0, 2.0)


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


# --- maps ------------------------------------------------------------------------------------------------------------


@triton.jit
def _turned(value, FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK_D: tl.constexpr):
    """[FIRST, (SECOND, BLOCK_D)] as [SECOND, (FIRST, BLOCK_D)]."""
    cube = tl.permute(tl.reshape(value, (FIRST, SECOND, BLOCK_D)), (1, 0, 2))
    return tl.reshape(cube, (SECOND, FIRST * BLOCK_D))


@triton.jit
def spectrum_of(
    points,
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
    """Real and imaginary part of the spectrum of a tile of points."""
    w_real, w_imaginary, h_real, h_imaginary = matrices
    none = tl.zeros((ROWS, COLUMNS * BLOCK_D), tl.float32)
    if GRID:
        half = tl.zeros((COLUMNS, HEIGHT * BLOCK_D), tl.float32)
        half_real = _turned(multiply(w_real, points, half, EXACT), COLUMNS, HEIGHT, BLOCK_D)
        real = multiply(h_real, half_real, none, EXACT)
        imaginary = real
        if FOURIER:
            imaginary = multiply(h_imaginary, half_real, none, EXACT)
            half_imaginary = _turned(multiply(w_imaginary, points, half, EXACT), COLUMNS, HEIGHT, BLOCK_D)
            real = multiply(-h_imaginary, half_imaginary, real, EXACT)
            imaginary = multiply(h_real, half_imaginary, imaginary, EXACT)
        return real, imaginary
    else:
        real = multiply(w_real, points, none, EXACT)
        imaginary = real
        if FOURIER:
            imaginary = multiply(w_imaginary, points, none, EXACT)
        return real, imaginary


@triton.jit
def points_of(
    real,
    imaginary,
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
    """The tile of points that the adjoint of `spectrum_of` makes of a spectrum."""
    w_real, w_imaginary, h_real, h_imaginary = matrices
    points = tl.zeros((WIDTH, HEIGHT * BLOCK_D), tl.float32)
    if GRID:
        none = tl.zeros((HEIGHT, COLUMNS * BLOCK_D), tl.float32)
        half = multiply(tl.trans(h_real), real, none, EXACT)
        if FOURIER:
            half_imaginary = multiply(tl.trans(-h_imaginary), real, none, EXACT)
            half = multiply(tl.trans(h_imaginary), imaginary, half, EXACT)
            half_imaginary = multiply(tl.trans(h_real), imaginary, half_imaginary, EXACT)
            half_imaginary = _turned(half_imaginary, HEIGHT, COLUMNS, BLOCK_D)
            points = multiply(tl.trans(w_imaginary), half_imaginary, points, EXACT)
        return multiply(tl.trans(w_real), _turned(half, HEIGHT, COLUMNS, BLOCK_D), points, EXACT)
    else:
        if FOURIER:
            points = multiply(tl.trans(w_imaginary), imaginary, points, EXACT)
        return multiply(tl.trans(w_real), real, points, EXACT)
