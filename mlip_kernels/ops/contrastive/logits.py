"""Token-level contrastive logits: the mean over tokens of the best similarity, image to text and text to image."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from mlip_kernels.ops.arguments import (
    autocast_enabled,
    check_mask,
    check_same_device,
    check_same_dtype,
    check_scalar,
    check_shape,
    check_tensor,
    check_tokens,
)
from mlip_kernels.ops.contrastive.primitives import token_maxima
from mlip_kernels.reference import contrastive as reference


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
    """Logits between every image and every text from their tokens (late interaction), in both directions.

    With v the image tokens, t the text tokens, w and u their weights::

        per_image[i, j] = scale · Σ_n w_in · max_m ⟨v_in, t_jm⟩ / Σ_n w_in + bias
        per_text[j, i]  = scale · Σ_m u_jm · max_n ⟨v_in, t_jm⟩ / Σ_m u_jm + bias

    where n and m run over the tokens that are not masked. Both come from one product of the tokens, and the
    ``[B, C, N, M]`` similarities never exist at once.

    Args:
        image_tokens: ``[B, N, D]``, usually of unit length along D (it is not checked and not enforced).
        text_tokens: ``[C, M, D]`` in the dtype of ``image_tokens``; under autocast, float32 and half may meet.
        image_mask, text_mask: ``[B, N]`` and ``[C, M]``, True where the token is real: booleans, or integers, of which
            0 masks a token. A masked token never wins a maximum, not even against negative similarities, and neither
            its value nor its weight is used.
        image_weight, text_weight: floating-point ``[B, N]`` and ``[C, M]``, for example the number of patches that a
            merged token stands for. They weigh the mean only: a token of weight 0 can still win a maximum. Meant to
            be non-negative (not checked, it would cost a synchronisation).
        scale: factor on both outputs, a finite number or a tensor of one element (CLIP's exponentiated temperature).
        bias: added to both outputs, a finite number or a tensor of one element, or None.

    Returns:
        ``per_image [B, C]`` and ``per_text [C, B]``, contiguous: float32, or float64 where the tokens are float64.
        Half-precision tokens are multiplied and accumulated in float32 and nothing is rounded to half in between.
        Autocast has no influence: float32 tokens are multiplied as float32, and tokens that autocast has made half
        are used as they are.

    Differentiable in the tokens, the weights, ``scale`` and ``bias``. Among equal similarities the lowest index wins
    and receives the whole gradient. Call ``backward`` outside autocast, as PyTorch asks for. The second derivative
    raises RuntimeError (`mlip_kernels.use_reference` computes it). Bitwise the same for any number of CPU threads.

    Saved for backward, besides the tokens, masks and weights: what won the maxima, ``B·C·(N + M)`` bytes for up to 256
    tokens on each side (twice that beyond), and, if a weight requires a gradient, the maxima: another
    ``4·B·C·(N + M)`` bytes (8 in float64). The gradient is sparse: ``4·B·C·(N + M)·D`` flops for both sides.

    Hard input: where one side has no unmasked token or weights that sum to 0, its mean is defined as 0, so the logit
    is ``bias`` (0 without one) and passes no gradient to tokens or weights; the other direction still exists if only
    the weights are 0. A NaN or an infinity in an unmasked token makes the logits of its pairs non-finite, and their
    gradients with them; in a masked token it is harmless. B or C may be 0.

    Raises:
        TypeError: an argument is no tensor or number, or of a dtype it cannot have.
        ValueError: a shape or a device does not fit.

    Source: Yao et al., "FILIP: Fine-grained Interactive Language-Image Pre-Training", ICLR 2022, eq. 5 and 6.
    """
    checked = check_token_logits(
        image_tokens,
        text_tokens,
        image_mask=image_mask,
        text_mask=text_mask,
        image_weight=image_weight,
        text_weight=text_weight,
        scale=scale,
        bias=bias,
    )
    kind = image_tokens.device.type
    with torch.autocast(kind, enabled=False) if autocast_enabled(kind) else nullcontext():
        return reference.token_logits(
            image_tokens,
            text_tokens,
            image_mask=checked.image_mask,
            text_mask=checked.text_mask,
            image_weight=image_weight,
            text_weight=text_weight,
            scale=checked.scale,
            bias=checked.bias,
            maxima=token_maxima(),
        )


class Checked(NamedTuple):
    """What `check_token_logits` returns: the arguments that come in more forms than one, in the form that is used."""

    image_mask: Tensor | None
    text_mask: Tensor | None
    scale: float | Tensor
    bias: float | Tensor | None


def check_token_logits(
    image_tokens: object,
    text_tokens: object,
    *,
    image_mask: object = None,
    text_mask: object = None,
    image_weight: object = None,
    text_weight: object = None,
    scale: object = 1.0,
    bias: object = None,
    names: tuple[str, str] = ("scale", "bias"),
) -> Checked:
    """Raise what `token_logits` raises for these arguments, looking at metadata only; ``names`` are the last two's."""
    images = check_tokens("image_tokens", image_tokens)
    texts = check_tokens("text_tokens", text_tokens)
    if texts.shape[2] != images.shape[2]:
        raise ValueError(
            f"text_tokens: expected [C, M, D] with D = {images.shape[2]} (that of image_tokens), "
            f"got shape {list(texts.shape)}"
        )
    check_same_device("text_tokens", texts, "image_tokens", images)
    check_same_dtype("text_tokens", texts, "image_tokens", images)
    masks: dict[str, Tensor | None] = {}
    for name, value, tokens, layout in (
        ("image_mask", image_mask, images, "[B, N]"),
        ("text_mask", text_mask, texts, "[C, M]"),
    ):
        shape = tokens.shape[:2]
        masks[name] = None if value is None else check_mask(name, value, shape, layout, "image_tokens", images)
    for name, value, tokens, layout in (
        ("image_weight", image_weight, images, "[B, N]"),
        ("text_weight", text_weight, texts, "[C, M]"),
    ):
        if value is not None:
            weight = check_tensor(name, value, layout=layout)
            check_shape(name, weight, tokens.shape[:2], layout)
            check_same_device(name, weight, "image_tokens", images)
    return Checked(
        image_mask=masks["image_mask"],
        text_mask=masks["text_mask"],
        scale=check_scalar(names[0], scale, "image_tokens", images),
        bias=None if bias is None else check_scalar(names[1], bias, "image_tokens", images),
    )
