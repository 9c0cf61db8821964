"""Means of the best similarity of every token, for every pair of an image b and a text c, in both directions, and the
index of the best token.

    per_image[b, c] = sum_n w_bn max_m <v_bn, t_cm>        per_text[c, b] = sum_m w_cm max_n <v_bn, t_cm>

    images v [B, N, D], texts t [C, M, D] float32, float16 or bfloat16    normalized weights w float32    masks boolean

    reads    B N D images and C M D texts; counted as often as they are loaded, images C M / 128 times, texts B N / 64
             times (rounded up for each text and image), all but the first from the L2 cache: 48 times what is
             compulsory for 64 x 64 pairs of 49 x 77 tokens with 256 channels in bfloat16, 4 MB that stay in that cache
    writes   8 B C bytes of means, B C (N + M) bytes of argmax indices (twice that beyond 256 tokens) and 4 B C (N + M)
             of maxima, where they are asked for
    flops    2 B C N M D on tensor cores, six times that for float32: `multiply`. On sm_90 Triton 3.8 gives chained
             products to twice as many warps as a tile has rows for, so that it is eleven times

The B C N M similarities never leave the registers. A tile of 64 x 128 loads (64 + 128) elements a channel from L2: 43
flops per byte in half precision, and in float32 21, with six products 128. A100 can do 43 (312 TFLOP/s in bfloat16, L2
of 5120 bytes a clock), H100 180 (989 TFLOP/s, with L2 taken to give 5.5 TB/s). So it is bound by the tensor cores in
float32 on A100, by both in half precision there, and by L2 on H100, at a quarter of what the tensor cores could do in
half precision. Tiles of 64 x 256 would have 51 flops per byte, but spill on sm_80 and leave no register on sm_90; 128
rows would have 64, but 49 tokens do not fill them.

A program owns one image and TEXTS texts. A tile of similarities has ROWS tokens of the image and, side by side, WIDTH
tokens of each text, so that 77 tokens take 80 columns and captions of 20 tokens in a batch padded to 77 take 32: the
walk over columns ends at the last real token of the group, which a launch before this one found. 49 x 77 tokens fill
74 % of 64 x 80, 196 x 32 fill 77 % of 256 x 32. Maxima over the tokens of a text stay in registers until the walk is
over. Maxima over the tokens of an image are complete at once if it has up to ROWS tokens; else they are carried from
one row of tiles to the next in the memory of the results. Programs go through images first, a few at a time, so that
those which run together read the same tokens.

Products of float32 are added in runs of BLOCK_D channels, since an accumulator of the tensor cores rounds towards zero
at each addition. Those of half precision accumulate there over all of D: each addition of 16 channels drops what is
below the 24 bits of float32, so a similarity of 512 channels is up to 2^-18 of itself too small. That is far less than
the rounding of the tokens, but several times the error of a float32 product by PyTorch, and means over tokens keep it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.contrastive.plain import Maxima, index_dtype
from mlip_kernels.triton import contiguous
from mlip_kernels.triton.spectral.tiles import multiply

SMALLEST = 16  # of either side of a product on tensor cores
ROWS = 64  # tokens of one side in a tile
COLUMNS = 128  # tokens of texts in a tile
IMAGES_TOGETHER = 16
NUM_WARPS = 8


@triton.jit
def _larger(a, b):
    """The larger one, NaN if either is: so torch.max has it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _first_of(values, largest, index, AXIS: tl.constexpr):
    """Lowest ``index`` along an axis of what equals its ``largest`` (expanded), or is NaN as that is."""
    return tl.min(tl.where((values == largest) | (values != values), index, 0x7FFFFFFF), AXIS)


@triton.jit
def _beats(new, old):
    """Whether ``new`` replaces ``old``: it is larger, or the first NaN."""
    return (new > old) | ((new != new) & (old == old))


@triton.jit(do_not_specialize=("B", "C"))
def contrastive_token_maxima_kernel(
    images,  # [B, N, D], unit stride in D
    texts,  # [C, M, D], unit stride in D
    image_mask,  # [B, N] bytes, or None
    text_mask,  # [C, M] bytes, or None
    image_length,  # int32 [B], with image_mask
    text_length,  # int32 [C], with text_mask
    image_weight,  # [B, N]
    text_weight,  # [C, M]
    per_image,  # [B, C]
    per_text,  # [C, B]
    argmax_text,  # [B, C, N]; this and the next ones hold 0 wherever nothing is real
    argmax_image,  # [B, C, M]
    text_maxima,  # [B, C, N]
    image_maxima,  # [B, C, M]
    B,
    C,
    N,
    M,
    D,
    image_batch,
    image_token,
    text_batch,
    text_token,
    KEEP_ARGMAX: tl.constexpr,
    KEEP_MAXIMA: tl.constexpr,
    EXACT: tl.constexpr,  # for float32: products as accurate as float32
    SEVERAL: tl.constexpr,  # whether an image takes more than one row of tiles
    ROWS: tl.constexpr,
    TEXTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOGETHER: tl.constexpr,
    WIDE: tl.constexpr,  # whether offsets inside a tile take 64 bits
):
    groups = tl.cdiv(C, TEXTS)
    first_image = tl.program_id(0) // (TOGETHER * groups) * TOGETHER
    position = tl.program_id(0) % (TOGETHER * groups)
    together = tl.minimum(TOGETHER, B - first_image)
    b = (first_image + position % together).to(tl.int64)
    first_text = (position // together * TEXTS).to(tl.int64)

    # Bases take 64 bits, and offsets from them 32: those of a whole tile would take most of the registers.
    images += b * image_batch
    texts += first_text * text_batch
    text_weight += first_text * M
    to_image = (b * C + first_text) * N
    to_text = (b * C + first_text) * M
    sets = (C - first_text).to(tl.int32)
    c = tl.arange(0, TEXTS)
    column = tl.arange(0, TEXTS * WIDTH)
    text = column // WIDTH
    token = tl.arange(0, ROWS)
    if WIDE:
        text, token = text.to(tl.int64), token.to(tl.int64)

    row_limit = N
    column_limit = M
    nothing = c >= sets
    if image_mask is not None:
        row_limit = tl.load(image_length + b)
    if text_mask is not None:
        length = tl.load(text_length + first_text + c, mask=c < sets, other=0)
        column_limit = tl.max(length, 0)
        nothing = length == 0

    image_mean = tl.zeros((TEXTS,), tl.float32)
    text_mean = tl.zeros((TEXTS,), tl.float32)
    zeros = tl.zeros((ROWS, TEXTS * WIDTH), tl.float32)
    for first_row in range(0, row_limit, ROWS):
        n = first_row + tl.arange(0, ROWS)
        row = n < N
        if image_mask is not None:
            row = tl.load(image_mask + b * N + n, mask=row, other=0) != 0
        last = first_row + ROWS >= row_limit

        best = tl.full((ROWS, TEXTS), float("-inf"), tl.float32)
        argmax = tl.zeros((ROWS, TEXTS), tl.int32)
        for first_column in range(0, column_limit, WIDTH):
            m = first_column + column % WIDTH
            in_bounds = (m < M) & (text < sets)
            real = in_bounds
            if text_mask is not None:
                real = tl.load(text_mask + first_text * M + (text * M + m), mask=in_bounds, other=0) != 0

            similarity = zeros
            for first_channel in tl.range(0, D, BLOCK_D, disable_licm=True):
                d = first_channel + tl.arange(0, BLOCK_D)
                at = (token * image_token)[:, None] + d[None, :]
                left = tl.load(
                    images + first_row.to(tl.int64) * image_token + at, mask=row[:, None] & (d < D)[None, :], other=0.0
                )
                at = (text * text_batch + column % WIDTH * text_token)[None, :] + d[:, None]
                right = tl.load(
                    texts + first_column.to(tl.int64) * text_token + at,
                    mask=real[None, :] & (d < D)[:, None],
                    other=0.0,
                )
                if EXACT:
                    similarity += multiply(left, right, zeros, True)
                else:
                    similarity = tl.dot(left, right, similarity)
            similarity = tl.where(row[:, None] & real[None, :], similarity, float("-inf"))

            by_text = tl.reshape(similarity, (ROWS, TEXTS, WIDTH))
            found = tl.reduce(by_text, 2, _larger)
            better = _beats(found, best)
            if KEEP_ARGMAX:
                index = (first_column + tl.arange(0, WIDTH))[None, None, :]
                argmax = tl.where(better, _first_of(by_text, found[:, :, None], index, 2), argmax)
            best = tl.where(better, found, best)

            found = tl.reduce(similarity, 0, _larger)
            to = text * M + m
            if KEEP_ARGMAX:
                first = _first_of(similarity, found[None, :], n[:, None], 0)
            if SEVERAL:
                # Other threads stored these in the last row of tiles. The barriers around the products' shared memory
                # lie between; the emulator reports a race if they ever do not.
                before = tl.load(image_maxima + to_text + to, mask=in_bounds & (first_row > 0), other=float("-inf"))
                better = _beats(found, before) | (first_row == 0)
                found = tl.where(better, found, before)
                if KEEP_ARGMAX:
                    first_before = tl.load(argmax_image + to_text + to, mask=in_bounds & ~better, other=0)
                    first = tl.where(better, first, first_before.to(tl.int32))
            found = tl.where(real | ~last, found, 0.0)
            if KEEP_ARGMAX:
                tl.store(argmax_image + to_text + to, first.to(argmax_image.dtype.element_ty), mask=in_bounds)
            if KEEP_MAXIMA or SEVERAL:
                tl.store(image_maxima + to_text + to, found, mask=in_bounds)
            term = found * tl.load(text_weight + to, mask=real & last, other=0.0)
            term = tl.where(real & last, term, 0.0)
            text_mean += tl.sum(tl.reshape(term, (TEXTS, WIDTH)), 1)

        best = tl.where(row[:, None] & ~nothing[None, :], best, 0.0)
        to = c[None, :] * N + n[:, None]
        stored = (n < N)[:, None] & (c < sets)[None, :]
        if KEEP_ARGMAX:
            tl.store(argmax_text + to_image + to, argmax.to(argmax_text.dtype.element_ty), mask=stored)
        if KEEP_MAXIMA:
            tl.store(text_maxima + to_image + to, best, mask=stored)
        weight = tl.load(image_weight + b * N + n, mask=row, other=0.0)
        image_mean += tl.sum(tl.where(row[:, None], weight[:, None] * best, 0.0), 0)

    tl.store(per_image + b * C + first_text + c, image_mean, mask=c < sets)
    tl.store(per_text + (first_text + c) * B + b, text_mean, mask=c < sets)


def rows_of(count: int) -> int:
    """Rows of a tile for ``count`` tokens."""
    return min(ROWS, max(SMALLEST, triton.next_power_of_2(count)))


def columns_of(batch: int, count: int, columns: int) -> tuple[int, int]:
    """How many of ``batch`` sets of ``count`` tokens share a tile of ``columns``, and how many tokens of each it has.

    As many sets as possible: whole tiles of 16 pad 77 tokens by 3, and a tile ends with its longest set.
    """
    sets = min(columns // SMALLEST, triton.next_power_of_2(batch))
    return sets, min(columns // sets, max(SMALLEST, triton.next_power_of_2(count)))


def lengths(mask: Tensor | None) -> Tensor | None:
    """``[B]`` int32, on the device: where the padding of ``mask [B, N]`` begins; 0 where nothing is real."""
    if mask is None:
        return None
    positions = torch.arange(1, mask.shape[1] + 1, dtype=torch.int32, device=mask.device)
    return torch.where(mask, positions, 0).amax(1)


def aligned(tokens: Tensor) -> Tensor:
    """``tokens [B, N, D]`` with rows that can be read 16 bytes at a time: a copy, padded by zeros, unless they can.

    A copy costs little beside the pairs of tokens, and saves a second version of the kernels.
    """
    padding = -tokens.shape[2] % SMALLEST
    bytes_apart = [stride * tokens.element_size() for stride in tokens.stride()[:2]]
    if padding:
        return torch.nn.functional.pad(tokens, (0, padding))
    if tokens.stride(2) != 1 or any(value % 16 for value in (tokens.data_ptr(), *bytes_apart)):
        return tokens.clone(memory_format=torch.contiguous_format)
    return tokens


def span(tensor: Tensor, *sizes: int) -> int:
    """Offset behind the last element of a tile with ``sizes`` along the first dimensions and all of the others."""
    return sum(
        size * stride for size, stride in zip((*sizes, *tensor.shape[len(sizes) :]), tensor.stride(), strict=True)
    )


def token_maxima(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    image_weight: Tensor,
    text_weight: Tensor,
    keep_argmax: bool,
    keep_maxima: bool,
) -> Maxima:
    """``mlip_kernels::contrastive_token_maxima`` on CUDA tensors.

    Images of more than 64 tokens take ``4·B·C·M`` bytes of memory during the call even where no maxima are kept.
    """
    (batch, count, _), (text_batch, text_count, _) = image_tokens.shape, text_tokens.shape
    rows = rows_of(count)
    several = count > rows

    def new(*shape: int, kept: bool, mask: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        create = image_weight.new_empty if mask is None else image_weight.new_zeros  # no program visits padding
        return create(shape if kept else (0,), dtype=dtype)

    to_images, to_texts = (batch, text_batch, count), (batch, text_batch, text_count)
    masked = text_mask if image_mask is None else image_mask
    argmax_text = new(*to_images, kept=keep_argmax, mask=masked, dtype=index_dtype(text_count if keep_argmax else 0))
    argmax_image = new(*to_texts, kept=keep_argmax, mask=masked, dtype=index_dtype(count if keep_argmax else 0))
    text_maxima = new(*to_images, kept=keep_maxima, mask=masked)
    image_maxima = new(*to_texts, kept=keep_maxima or several, mask=masked)
    per_image = image_weight.new_empty(batch, text_batch)
    per_text = image_weight.new_empty(text_batch, batch)

    if per_image.numel():
        exact = image_tokens.dtype == torch.float32
        images, others = aligned(image_tokens), aligned(text_tokens)
        texts, width = columns_of(text_batch, text_count, COLUMNS)
        contrastive_token_maxima_kernel[batch * triton.cdiv(text_batch, texts),](
            images,
            others,
            *contiguous(image_mask, text_mask),
            lengths(image_mask),
            lengths(text_mask),
            *contiguous(image_weight, text_weight),
            per_image,
            per_text,
            argmax_text,
            argmax_image,
            text_maxima,
            image_maxima,
            *(batch, text_batch, count, text_count, images.shape[2]),
            *images.stride()[:2],
            *others.stride()[:2],
            KEEP_ARGMAX=keep_argmax,
            KEEP_MAXIMA=keep_maxima,
            EXACT=exact,
            SEVERAL=several,
            ROWS=rows,
            TEXTS=texts,
            WIDTH=width,
            BLOCK_D=16 if exact else 64,
            TOGETHER=IMAGES_TOGETHER,
            WIDE=max(span(images, 1, rows), span(others, texts, width)) >= 2**31,
            num_warps=NUM_WARPS,
            num_stages=2,
            maxnreg=255,
        )
    kept_maxima = image_maxima if keep_maxima else image_weight.new_empty(0)
    return per_image, per_text, argmax_text, argmax_image, text_maxima, kept_maxima
