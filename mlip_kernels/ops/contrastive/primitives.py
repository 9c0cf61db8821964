"""The primitives of the contrastive family as registered operators, and their gradients.

    contrastive_token_maxima            means of the best similarities in both directions, and what won
    contrastive_token_maxima_backward   gradient of the tokens of one side, sparse through the winners

Why they are cut like this:

* Weights enter as shares in a mean, and scale and bias stay outside: on ``[B, N]`` and ``[B, C]`` plain PyTorch costs
  nothing beside the pairs of tokens, and brings the gradients of weights, scale and bias along.
* One backward serves both sides: images and texts change places, and the maps are read transposed. Every row of the
  result belongs to one worker that adds its terms in a fixed order, so there are no atomics and the bits are the same
  from run to run. The coefficients never exist as B x C x N x M.
* A map names a token even where there is none to name (the other side is all masked): it then names a masked one, and
  the backward leaves out every term with a masked token. So uint8 serves up to 256 tokens, with no code for "none".
* Maps and maxima are written only where a gradient asks for them. The gradient of a share is the maximum it weighs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlip_kernels._library import define, differentiate, plain_needed
from mlip_kernels.reference import contrastive as reference
from mlip_kernels.reference.contrastive import Maxima, index_dtype


def token_maxima() -> Callable[..., Maxima] | None:
    """The registered operator, or plain PyTorch (None) where it was asked for or where it alone can be transformed."""
    return None if plain_needed() else _token_maxima


def _fake_token_maxima(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    image_share: Tensor,
    text_share: Tensor,
    keep_best: bool,
    keep_maxima: bool,
) -> Maxima:
    (batch, image_count, _), (text_batch, text_count, _) = image_tokens.shape, text_tokens.shape

    def empty(*shape: int, kept: bool = True, dtype: torch.dtype = image_share.dtype) -> Tensor:
        return image_share.new_empty(shape if kept else (0,), dtype=dtype)

    return (
        empty(batch, text_batch),
        empty(text_batch, batch),
        # Comparing a symbolic count would be remembered as a condition on it, so it is done only where it matters.
        empty(batch, text_batch, image_count, kept=keep_best, dtype=_index_dtype(text_count, keep_best)),
        empty(batch, text_batch, text_count, kept=keep_best, dtype=_index_dtype(image_count, keep_best)),
        empty(batch, text_batch, image_count, kept=keep_maxima),
        empty(batch, text_batch, text_count, kept=keep_maxima),
    )


def _index_dtype(count: int, kept: bool) -> torch.dtype:
    return index_dtype(count) if kept else torch.uint8


def _fake_token_maxima_backward(
    grad_mean: Tensor,
    grad_other_mean: Tensor,
    other_tokens: Tensor,
    mask: Tensor | None,
    other_mask: Tensor | None,
    share: Tensor,
    other_share: Tensor,
    best_other: Tensor,
    best: Tensor,
) -> Tensor:
    return other_tokens.new_empty(*share.shape, other_tokens.shape[2])


_token_maxima = define(
    "contrastive_token_maxima(Tensor image_tokens, Tensor text_tokens, Tensor? image_mask, Tensor? text_mask,"
    " Tensor image_share, Tensor text_share, bool keep_best, bool keep_maxima)"
    " -> (Tensor per_image, Tensor per_text, Tensor best_text, Tensor best_image,"
    " Tensor text_maxima, Tensor image_maxima)",
    reference=reference.token_maxima,
    fake=_fake_token_maxima,
    triton="mlip_kernels.triton.contrastive.token_maxima:token_maxima",
)
_token_maxima_backward = define(
    "contrastive_token_maxima_backward(Tensor grad_mean, Tensor grad_other_mean, Tensor other_tokens, Tensor? mask,"
    " Tensor? other_mask, Tensor share, Tensor other_share, Tensor best_other, Tensor best) -> Tensor grad_tokens",
    reference=reference.token_maxima_backward,
    fake=_fake_token_maxima_backward,
    triton="mlip_kernels.triton.contrastive.token_maxima_backward:token_maxima_backward",
)


def _save(ctx: Any, inputs: tuple, output: Maxima) -> None:
    images, texts, image_mask, text_mask, image_share, text_share, keep_best, keep_maxima = inputs
    _, _, best_text, best_image, text_maxima, image_maxima = output
    ctx.mark_non_differentiable(best_text, best_image, text_maxima, image_maxima)
    ctx.set_materialize_grads(False)
    needs_images, needs_texts, _, _, needs_image_share, needs_text_share = ctx.needs_input_grad[:6]
    if (needs_images or needs_texts) and not keep_best:
        raise ValueError("keep_best: expected True where tokens need a gradient, got False")
    if (needs_image_share or needs_text_share) and not keep_maxima:
        raise ValueError("keep_maxima: expected True where shares need a gradient, got False")
    maps = (best_text, best_image) if needs_images or needs_texts else (None, None)
    ctx.save_for_backward(
        images if needs_texts else None,
        texts if needs_images else None,
        image_mask,
        text_mask,
        image_share,
        text_share,
        *maps,
        text_maxima if needs_image_share else None,
        image_maxima if needs_text_share else None,
    )


def _gradients(ctx: Any, grad_per_image: Tensor | None, grad_per_text: Tensor | None, *_: None) -> tuple:
    images, texts, image_mask, text_mask, image_share, text_share, *maps, text_maxima, image_maxima = ctx.saved_tensors
    shape = (image_share.shape[0], text_share.shape[0])
    if grad_per_image is None:
        grad_per_image = image_share.new_zeros(shape)
    if grad_per_text is None:
        grad_per_text = image_share.new_zeros(shape[::-1])
    grad_images = grad_texts = grad_image_share = grad_text_share = None
    if ctx.needs_input_grad[0]:
        grad_images = _token_maxima_backward(
            grad_per_image, grad_per_text, texts, image_mask, text_mask, image_share, text_share, *maps
        )
    if ctx.needs_input_grad[1]:
        best_image, best_text = (best.transpose(0, 1) for best in reversed(maps))
        grad_texts = _token_maxima_backward(
            grad_per_text, grad_per_image, images, text_mask, image_mask, text_share, image_share, best_image, best_text
        )
    if ctx.needs_input_grad[4]:
        grad_image_share = torch.einsum("bc,bcn->bn", grad_per_image, text_maxima)
    if ctx.needs_input_grad[5]:
        grad_text_share = torch.einsum("cb,bcm->cm", grad_per_text, image_maxima)
    return grad_images, grad_texts, None, None, grad_image_share, grad_text_share, None, None


differentiate(
    "contrastive_token_maxima",
    setup_context=_save,
    backward=_gradients,
    through=("contrastive_token_maxima_backward",),
)
