"""Gradient of the tokens of one side: each token gets its own argmax, and the tokens whose argmax it is.

    grad[b, n] = sum_cm K[b, n, cm] t_cm      K[b, n, cm] = g_bc w_bn [argmax_other_bcn = m]
                                                          + h_cb other_w_cm [argmax_bcm = n]

    other tokens t [C, M, D] float32, float16 or bfloat16, grad [B, N, D] as they are     g [B, C], h [C, B] float32
    normalized weights w float32     argmax_other [B, C, N], argmax [B, C, M] uint8, int16 or int32     masks boolean

    reads    C M D other tokens and B C (N + M) bytes of indices. Counted as often as they are loaded, tokens B N / 64
             times (rounded up for each b) and indices D / 128 times, all but the first from the L2 cache: 35 times what
             is compulsory for 64 x 64 pairs of 49 x 77 tokens with 256 channels in bfloat16
    writes   B N D
    flops    2 B C (N + M) D are needed; as a product with the sparse matrix K on tensor cores it is 2 B C N M D, times
             two for bfloat16, three for float16 and six for float32; three, five and eleven on sm_90, where Triton
             3.8 gives chained products to twice as many warps as a tile has rows for

The one-hot matrix K is made in registers, from the indices, and is never stored. Whether a dense product is right
depends on the GPU. For a pair of 49 x 77 tokens, padded to 64 x 80, one side takes 2 * 64 * 80 D flops as often as
above, or loads M D elements, whichever takes longer; gathering loads (N + M) D elements from the L2 cache. By
arithmetic, at full rates, the dense product takes so many times what gathering takes:

    bfloat16 1.9, float16 2.8, float32 2.8 on A100 (312 TFLOP/s; 5120 bytes of L2 a clock, 7.2 TB/s)
    bfloat16 0.7, float16 1.1, float32 1.2 on H100 (989 TFLOP/s; 5.5 TB/s of L2, assumed)

That leaves out what gathering costs besides: lists of the tokens whose argmax a token is, and sums in memory. CUDA C++
has shared memory for both (token_maxima_backward.cu). Triton can index neither registers nor shared memory by data: it
would take atomics on floats, whose sums depend on an order, or sort B C (N + M) terms by where they go. To gather the
token's own argmax alone, N D elements, saves nothing: the other term takes the whole product, which has room for both.

A program owns ROWS tokens of one b and BLOCK_D channels, and walks over all c, SETS at a time, and their tokens, WIDTH
of each at a time, up to the last real one of the group. So it adds its terms in a fixed order, there are no atomics,
and the bits are the same from run to run. Products are added in runs of one tile, since an accumulator of the tensor
cores rounds towards zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.triton import contiguous
from mlip_kernels.triton.contrastive.token_maxima import aligned, columns_of, lengths, rows_of, span
from mlip_kernels.triton.spectral.tiles import multiply

COLUMNS = 32  # tokens of the other side in a tile; half as many where products take more parts
BLOCK_D = 128
NUM_WARPS = 8


@triton.jit
def _product(coefficient, tokens, zeros):
    """``coefficient @ tokens`` of a float32 matrix, as accurate as the tokens are.

    Two bfloat16 parts of a coefficient have 16 bits, twice what the result of tokens in bfloat16 has.
    """
    if tokens.dtype == tl.bfloat16:
        high = coefficient.to(tl.bfloat16)
        product = tl.dot((coefficient - high.to(tl.float32)).to(tl.bfloat16), tokens, zeros)
        product = tl.dot(high, tokens, product)
    else:
        product = multiply(coefficient, tokens.to(tl.float32), zeros, tokens.dtype == tl.float32)
    return product


@triton.jit(do_not_specialize=("C",))
def contrastive_token_maxima_backward_kernel(
    grad_mean,  # [B, C]
    grad_other_mean,  # [C, B]
    others,  # [C, M, D], unit stride in D
    mask,  # [B, N] bytes, or None
    other_mask,  # [C, M] bytes, or None
    length,  # int32 [B], with mask
    other_length,  # int32 [C], with other_mask
    weight,  # [B, N]
    other_weight,  # [C, M]
    argmax_other,  # [B, C, N]
    argmax,  # [B, C, M]
    grad,  # [B, N, D]
    C,
    N,
    M,
    D,
    other_D,  # D, rounded up
    mean_strides,
    other_mean_strides,
    other_strides,
    argmax_other_strides,
    argmax_strides,
    ROWS: tl.constexpr,
    SETS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,  # whether offsets inside a tile take 64 bits
):
    row_blocks = tl.cdiv(N, ROWS)
    b = (tl.program_id(0) // row_blocks).to(tl.int64)
    first_row = tl.program_id(0) % row_blocks * ROWS
    n = first_row + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    column = tl.arange(0, SETS * WIDTH)
    c = tl.arange(0, SETS)
    set_of = column // WIDTH
    if WIDE:
        n, c, column, set_of = n.to(tl.int64), c.to(tl.int64), column.to(tl.int64), set_of.to(tl.int64)
    # Bases take 64 bits, and offsets from them 32: those of a whole tile would take most of the registers.
    argmax_other += b * argmax_other_strides[0]
    argmax += b * argmax_strides[0]
    grad_mean += b * mean_strides[0]
    grad_other_mean += b * other_mean_strides[1]

    row = n < N
    walk = C
    if mask is not None:
        row = tl.load(mask + b * N + n, mask=row, other=0) != 0
        walk = tl.where(first_row < tl.load(length + b), C, 0)
    position = tl.where(row, n, -2)
    own_weight = tl.load(weight + b * N + n, mask=row, other=0.0)
    zeros = tl.zeros((ROWS, BLOCK_D), tl.float32)
    total = zeros
    for first_set in range(0, walk, SETS):
        sets = C - first_set
        first = first_set.to(tl.int64)
        column_limit = M
        in_bounds = c < sets
        if other_mask is not None:
            length_of = tl.load(other_length + first + c, mask=in_bounds, other=0)
            column_limit = tl.max(length_of, 0)
            in_bounds = length_of > 0

        own = tl.load(grad_mean + first * mean_strides[1] + c * mean_strides[1], mask=in_bounds, other=0.0)
        own = own_weight[:, None] * own[None, :]
        at = (c * argmax_other_strides[1])[None, :] + (n * argmax_other_strides[2])[:, None]
        pointers = argmax_other + first * argmax_other_strides[1] + at
        used = row[:, None] & in_bounds[None, :]
        target = tl.where(used, tl.load(pointers, mask=used, other=0).to(tl.int32), -1)
        for first_column in range(0, column_limit, WIDTH):
            m = first_column + column % WIDTH
            real = (m < M) & (set_of < sets)
            flat = set_of * M + m
            if other_mask is not None:
                real = tl.load(other_mask + first * M + flat, mask=real, other=0) != 0
            grads = grad_other_mean + first * other_mean_strides[0] + set_of * other_mean_strides[0]
            chosen_grad = tl.load(grads, mask=real, other=0.0)
            chosen_grad *= tl.load(other_weight + first * M + flat, mask=real, other=0.0)
            argmax_pointers = argmax + first * argmax_strides[1] + (set_of * argmax_strides[1] + m * argmax_strides[2])
            chosen = tl.where(real, tl.load(argmax_pointers, mask=real, other=0).to(tl.int32), -1)

            index = (first_column + tl.arange(0, WIDTH))[None, None, :]
            coefficient = tl.where(target[:, :, None] == index, own[:, :, None], 0.0)
            coefficient = tl.reshape(coefficient, (ROWS, SETS * WIDTH))
            coefficient += tl.where(chosen[None, :] == position[:, None], chosen_grad[None, :], 0.0)

            base = others + first * other_strides[0] + first_column.to(tl.int64) * other_strides[1]
            token = (set_of * other_strides[0] + column % WIDTH * other_strides[1])[:, None] + d[None, :]
            tokens = tl.load(base + token, mask=real[:, None] & (d < other_D)[None, :], other=0.0)
            total += _product(coefficient, tokens, zeros)
    to = tl.arange(0, ROWS)[:, None] * D + d[None, :]
    tl.store(
        grad + (b * N + first_row) * D + to, total.to(grad.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :]
    )


def token_maxima_backward(
    grad_mean: Tensor,
    grad_other_mean: Tensor,
    other_tokens: Tensor,
    mask: Tensor | None,
    other_mask: Tensor | None,
    weight: Tensor,
    other_weight: Tensor,
    argmax_other: Tensor,
    argmax: Tensor,
) -> Tensor:
    """``mlip_kernels::contrastive_token_maxima_backward`` on CUDA tensors."""
    (batch, count), (other_batch, other_count, channels) = weight.shape, other_tokens.shape
    if batch == 0 or other_batch == 0:
        return other_tokens.new_zeros(batch, count, channels)
    grad = other_tokens.new_empty(batch, count, channels)
    rows = rows_of(count)
    sets, width = columns_of(
        other_batch, other_count, COLUMNS if other_tokens.dtype == torch.bfloat16 else COLUMNS // 2
    )
    others = aligned(other_tokens)
    contrastive_token_maxima_backward_kernel[batch * triton.cdiv(count, rows), triton.cdiv(channels, BLOCK_D)](
        grad_mean,
        grad_other_mean,
        others,
        *contiguous(mask, other_mask),
        lengths(mask),
        lengths(other_mask),
        *contiguous(weight, other_weight),
        argmax_other,
        argmax,
        grad,
        *(other_batch, count, other_count, channels, others.shape[2]),
        grad_mean.stride(),
        grad_other_mean.stride(),
        others.stride()[:2],
        argmax_other.stride(),
        argmax.stride(),
        ROWS=rows,
        SETS=sets,
        WIDTH=width,
        BLOCK_D=BLOCK_D,
        WIDE=max(
            span(others, sets, width),
            span(argmax_other.transpose(0, 1), sets, count),
            span(argmax.transpose(0, 1), sets, other_count),
        )
        >= 2**31,
        num_warps=NUM_WARPS,
        num_stages=2,
        maxnreg=255,
    )
    return grad
