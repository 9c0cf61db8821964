"""Means of the best similarity of every token, for every pair of an image b and a text c, in both directions, and the
token that is best for each.

    per_image[b, c] = sum_n share_bn max_m <v_bn, t_cm>        per_text[c, b] = sum_m share_cm max_n <v_bn, t_cm>

    images v [B, N, D], texts t [C, M, D] float32, float16 or bfloat16     shares float32     masks boolean

    reads    B N D images and C M D texts; counted as often as they are asked for, images C M / 128 times and texts
             B N / 64 times (rounded up for each text and image), all but the first from the L2 cache: 48 times what is
             compulsory for 64 x 64 pairs of 49 x 77 tokens with 256 channels in bfloat16, 4 MB that stay in that cache
    writes   8 B C bytes of means, B C (N + M) bytes of maps (twice that beyond 256 tokens) and 4 B C (N + M) of
             maxima, where they are wanted
    flops    2 B C N M D on tensor cores, six times that for float32: spectral/products.py. On sm_90 Triton 3.8 gives
             chained products to twice as many warps as a tile has rows for, so that it is eleven times

The B C N M similarities never leave the registers. A tile of 64 x 128 asks L2 for (64 + 128) elements a channel: 43
flops per byte in half precision, and in float32 21, with six products 128. A100 can do 43 (312 TFLOP/s in bfloat16, L2
of 5120 bytes a clock), H100 180 (989 TFLOP/s, with L2 taken to give 5.5 TB/s). So it is bound by the tensor cores in
float32 on A100, by both in half precision there, and by L2 on H100, at a quarter of what the tensor cores could do in
half precision. Tiles of 64 x 256 would have 51 flops per byte, but spill on sm_80 and leave no register on sm_90; 128
rows would have 64, but 49 tokens do not fill them.

A program owns one image and TEXTS texts. A tile of similarities has ROWS tokens of the image and, side by side, WIDTH
tokens of each text, so that 77 tokens take 80 columns and captions of 20 tokens in a batch padded to 77 take 32: the
walk over columns ends at the last real token of the group, which a launch before this one found. 49 x 77 tokens fill
74 % of 64 x 80, 196 x 32 fill 77 % of 256 x 32. Maxima over the tokens of a text are kept in registers until the walk
is over. Maxima over the tokens of an image are complete at once if it has up to ROWS tokens; else they are carried
from one row of tiles to the next in the memory of the results. Programs go through images first, a few at a time, so
that those which run together read the same tokens.

Products of float32 are added in runs of BLOCK_D channels, since an accumulator of the tensor cores rounds towards zero
at each addition. Those of half precision accumulate there over all of D: where each addition of 16 channels drops what
is below the 24 bits of float32, a similarity of 512 channels is up to 2^-18 of itself too small, far less than the
tokens were rounded by, but several times what a float32 product by PyTorch errs by, and means over tokens keep that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.contrastive.plain import Maxima, index_dtype
from mlip_kernels.triton.contrastive.launches import aligned, columns_of, contiguous, lengths, rows_of, span
from mlip_kernels.triton.spectral.products import multiply

COLUMNS = 128  # tokens of texts in a tile
IMAGES_TOGETHER = 16
NUM_WARPS = 8


@triton.jit
def _larger(a, b):
    """The larger one, NaN if either is: so torch.max has it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _first_of(values, largest, index, AXIS: tl.constexpr):
    """Lowest ``index`` of those along an axis that equal its ``largest`` (expanded), or are NaN as it is."""
    return tl.min(tl.where((values == largest) | (values != values), index, 0x7FFFFFFF), AXIS)


@triton.jit
def _beats(new, old):
    """Whether ``new`` is better than what came before it: larger, or the first NaN."""
    return (new > old) | ((new != new) & (old == old))


@triton.jit(do_not_specialize=("B", "C"))
def contrastive_token_maxima_kernel(
    images,  # [B, N, D], unit stride in D
    texts,  # [C, M, D], unit stride in D
    image_mask,  # [B, N] bytes, or None
    text_mask,  # [C, M] bytes, or None
    image_length,  # int32 [B], with image_mask
    text_length,  # int32 [C], with text_mask
    image_share,  # [B, N]
    text_share,  # [C, M]
    per_image,  # [B, C]
    per_text,  # [C, B]
    best_text,  # [B, C, N]; this and the next ones hold 0 wherever nothing is real
    best_image,  # [B, C, M]
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
    KEEP_BEST: tl.constexpr,
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
    place = tl.program_id(0) % (TOGETHER * groups)
    together = tl.minimum(TOGETHER, B - first_image)
    b = (first_image + place % together).to(tl.int64)
    first_text = (place // together * TEXTS).to(tl.int64)

    # Bases take 64 bits, and offsets from them 32: those of a whole tile would take most of the registers.
    images += b * image_batch
    texts += first_text * text_batch
    text_share += first_text * M
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
    none = tl.zeros((ROWS, TEXTS * WIDTH), tl.float32)
    for first_row in range(0, row_limit, ROWS):
        n = first_row + tl.arange(0, ROWS)
        row = n < N
        if image_mask is not None:
            row = tl.load(image_mask + b * N + n, mask=row, other=0) != 0
        last = first_row + ROWS >= row_limit

        best = tl.full((ROWS, TEXTS), float("-inf"), tl.float32)
        winner = tl.zeros((ROWS, TEXTS), tl.int32)
        for first_column in range(0, column_limit, WIDTH):
            m = first_column + column % WIDTH
            there = (m < M) & (text < sets)
            real = there
            if text_mask is not None:
                real = tl.load(text_mask + first_text * M + (text * M + m), mask=there, other=0) != 0

            similarity = none
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
                    similarity += multiply(left, right, none, True)
                else:
                    similarity = tl.dot(left, right, similarity)
            similarity = tl.where(row[:, None] & real[None, :], similarity, float("-inf"))

            by_text = tl.reshape(similarity, (ROWS, TEXTS, WIDTH))
            found = tl.reduce(by_text, 2, _larger)
            better = _beats(found, best)
            if KEEP_BEST:
                index = (first_column + tl.arange(0, WIDTH))[None, None, :]
                winner = tl.where(better, _first_of(by_text, found[:, :, None], index, 2), winner)
            best = tl.where(better, found, best)

            found = tl.reduce(similarity, 0, _larger)
            to = text * M + m
            if KEEP_BEST:
                first = _first_of(similarity, found[None, :], n[:, None], 0)
            if SEVERAL:
                # Carried by other threads, and there: since they stored it, all have met at the barriers between which
                # the products above passed through shared memory. The emulator reports a race if ever they do not.
                before = tl.load(image_maxima + to_text + to, mask=there & (first_row > 0), other=float("-inf"))
                better = _beats(found, before) | (first_row == 0)
                found = tl.where(better, found, before)
                if KEEP_BEST:
                    first = tl.where(
                        better, first, tl.load(best_image + to_text + to, mask=there & ~better, other=0).to(tl.int32)
                    )
            found = tl.where(real | ~last, found, 0.0)
            if KEEP_BEST:
                tl.store(best_image + to_text + to, first.to(best_image.dtype.element_ty), mask=there)
            if KEEP_MAXIMA or SEVERAL:
                tl.store(image_maxima + to_text + to, found, mask=there)
            term = found * tl.load(text_share + to, mask=real & last, other=0.0)
            term = tl.where(real & last, term, 0.0)
            text_mean += tl.sum(tl.reshape(term, (TEXTS, WIDTH)), 1)

        best = tl.where(row[:, None] & ~nothing[None, :], best, 0.0)
        to = c[None, :] * N + n[:, None]
        stored = (n < N)[:, None] & (c < sets)[None, :]
        if KEEP_BEST:
            tl.store(best_text + to_image + to, winner.to(best_text.dtype.element_ty), mask=stored)
        if KEEP_MAXIMA:
            tl.store(text_maxima + to_image + to, best, mask=stored)
        share = tl.load(image_share + b * N + n, mask=row, other=0.0)
        image_mean += tl.sum(tl.where(row[:, None], share[:, None] * best, 0.0), 0)

    tl.store(per_image + b * C + first_text + c, image_mean, mask=c < sets)
    tl.store(per_text + (first_text + c) * B + b, text_mean, mask=c < sets)


def token_maxima(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    image_share: Tensor,
    text_share: Tensor,
    keep_best: bool,
    keep_maxima: bool,
) -> Maxima:
    """``mlip_kernels::contrastive_token_maxima`` on CUDA tensors.

    Images of more than 64 tokens take ``4·B·C·M`` bytes of memory during the call even where no maxima are kept.
    """
    (batch, count, _), (text_batch, text_count, _) = image_tokens.shape, text_tokens.shape
    rows = rows_of(count)
    several = count > rows

    def new(*shape: int, kept: bool, mask: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        create = image_share.new_empty if mask is None else image_share.new_zeros  # no program visits padding
        return create(shape if kept else (0,), dtype=dtype)

    to_images, to_texts = (batch, text_batch, count), (batch, text_batch, text_count)
    masked = text_mask if image_mask is None else image_mask
    best_text = new(*to_images, kept=keep_best, mask=masked, dtype=index_dtype(text_count if keep_best else 0))
    best_image = new(*to_texts, kept=keep_best, mask=masked, dtype=index_dtype(count if keep_best else 0))
    text_maxima = new(*to_images, kept=keep_maxima, mask=masked)
    image_maxima = new(*to_texts, kept=keep_maxima or several, mask=masked)
    per_image = image_share.new_empty(batch, text_batch)
    per_text = image_share.new_empty(text_batch, batch)

    if per_image.numel():
        exact = image_tokens.dtype == torch.float32
        images, others = aligned(image_tokens), aligned(text_tokens)
        texts, width = columns_of(text_batch, text_count, COLUMNS)
        contrastive_token_maxima_kernel[batch * triton.cdiv(text_batch, texts),](
            images,
            others,
            contiguous(image_mask),
            contiguous(text_mask),
            lengths(image_mask),
            lengths(text_mask),
            image_share.contiguous(),
            text_share.contiguous(),
            per_image,
            per_text,
            best_text,
            best_image,
            text_maxima,
            image_maxima,
            batch,
            text_batch,
            count,
            text_count,
            images.shape[2],
            *images.stride()[:2],
            *others.stride()[:2],
            KEEP_BEST=keep_best,
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
    kept_maxima = image_maxima if keep_maxima else image_share.new_empty(0)
    return per_image, per_text, best_text, best_image, text_maxima, kept_maxima
