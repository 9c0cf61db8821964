"""Token-level contrastive logits in plain PyTorch: the definition of right.

Late interaction as in FILIP (Yao et al., "FILIP: Fine-grained Interactive Language-Image Pre-Training", ICLR 2022,
eq. 5 and 6), extended by masks on both sides and by weights that let a merged token count for what it stands for.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Similarities computed at a time (16 MiB in float32): they stay in cache, and memory stays flat in the batch."""


def token_logits(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_weight: Tensor | None = None,
    text_weight: Tensor | None = None,
    scale: float | Tensor = 1.0,
    bias: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mlip_kernels.ops.contrastive.token_logits`, differentiable by autograd, to any order.

    The similarities of a few images with all texts are computed at a time. Autograd keeps their two argmax maps, int64,
    and, where a weight needs a gradient, the maxima: ``8·B·C·(N + M)`` and another ``4·B·C·(N + M)`` bytes.
    """
    dtype = torch.promote_types(torch.promote_types(image_tokens.dtype, text_tokens.dtype), torch.float32)
    images, image_penalty, image_share = _prepared(image_tokens, image_mask, image_weight, dtype)
    texts, text_penalty, text_share = _prepared(text_tokens, text_mask, text_weight, dtype)
    (batch, image_count, _), (text_batch, text_count, _) = images.shape, texts.shape
    columns = texts.flatten(0, 1).t()

    to_image, to_text = [], []
    chunk = max(1, CHUNK_ELEMENTS // max(1, image_count * text_batch * text_count))
    for start in range(0, max(batch, 1), chunk):
        part = slice(start, start + chunk)
        rows = images[part].flatten(0, 1)
        products = rows @ columns if text_penalty is None else torch.addmm(text_penalty.reshape(-1), rows, columns)
        similarity = products.view(images[part].shape[0], image_count, text_batch, text_count)
        if image_penalty is not None:
            similarity = similarity + image_penalty[part, :, None, None]

        # torch.max gives the whole gradient to the first of equal maxima; torch.amax would divide it among them.
        best_text = similarity.max(dim=3).values
        best_image = similarity.max(dim=1).values
        if image_mask is not None:
            best_text = best_text.masked_fill(~image_mask[part, :, None], 0)
        if text_mask is not None:
            best_image = best_image.masked_fill(~text_mask, 0)
        to_image.append((image_share[part, :, None] * best_text).sum(dim=1))
        to_text.append((text_share * best_image).sum(dim=2))

    return _affine(torch.cat(to_image), scale, bias), _affine(torch.cat(to_text).t().contiguous(), scale, bias)


def _prepared(
    tokens: Tensor, mask: Tensor | None, weight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Tokens with 0 where masked, what to add to their similarities, and their shares in the mean, which sum to 1 or 0.

    Where a whole side is masked its zeroed tokens stay in the running: they win with similarity 0 and a zero gradient,
    which is what the empty maximum is defined to be.
    """
    tokens = tokens.to(dtype)
    weight = tokens.new_ones(tokens.shape[:2]) if weight is None else weight.to(dtype)
    penalty = None
    if mask is not None:
        tokens = tokens.masked_fill(~mask.unsqueeze(-1), 0)
        weight = weight.masked_fill(~mask, 0)
        absent = ~mask & mask.any(dim=1, keepdim=True)
        penalty = torch.zeros_like(absent, dtype=dtype).masked_fill(absent, -torch.inf)
    total = weight.sum(dim=1, keepdim=True)
    share = (weight / total.masked_fill(total == 0, 1)).masked_fill(total == 0, 0)
    return tokens, penalty, share


def _affine(mean: Tensor, scale: float | Tensor, bias: float | Tensor | None) -> Tensor:
    logits = mean * _scalar(scale, mean)
    return logits if bias is None else logits + _scalar(bias, mean)


def _scalar(value: float | Tensor, like: Tensor) -> float | Tensor:
    return value.to(like.dtype).reshape(()) if isinstance(value, Tensor) else value
