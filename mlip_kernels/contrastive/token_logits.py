"""Token-level contrastive logits: the mean over tokens of the best similarity, image to text and text to image.

Two kernels do the work on pairs of tokens, and plain PyTorch what is left, on ``[B, N]`` and ``[B, C]``:

* Weights enter the kernels normalized; scale and bias stay outside.
* One backward serves both sides: images and texts change places, and the maps are read transposed. Every row of the
  result belongs to one worker that adds its terms in a fixed order, so there are no atomics and the bits are the same
  from run to run. The coefficients never exist as B x C x N x M.
* A map names a token even where there is none to name (the other side is all masked): it then names a masked one, and
  the backward leaves out every term with a masked token. So uint8 serves up to 256 tokens, with no code for "none".
* Maps and maxima are written only where a gradient asks for them. The gradient of a normalized weight is the maximum
  it weighs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlip_kernels._arguments import (
    autocast_enabled,
    check_mask,
    check_same_device,
    check_same_dtype,
    check_scalar,
    check_shape,
    check_tensor,
    check_tokens,
)
from mlip_kernels._library import define_kernel
from mlip_kernels._operator import Operator, define_backward, needed
from mlip_kernels.contrastive import plain
from mlip_kernels.contrastive.plain import affine, in_one_dtype, index_dtype, normalized_weights


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
    return _token_logits(image_tokens, text_tokens, image_mask, text_mask, image_weight, text_weight, scale, bias)


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


DIFFERENTIABLE = (0, 1, 4, 5, 6, 7)
"""The positions of tokens, weights, scale and bias."""


class TokenLogits(Operator):
    """``TokenLogits.apply(image_tokens, text_tokens, image_mask=None, text_mask=None, image_weight=None,
    text_weight=None, scale=1.0, bias=None) -> (per_image [B, C], per_text [C, B])``: see `token_logits`.

    Saved for backward: the tokens, masks and weights, the maps of the winners, the maxima where a weight needs a
    gradient, and the means where ``scale`` does. The second derivative raises.
    """

    schema = (
        "token_logits(Tensor image_tokens, Tensor text_tokens, Tensor? image_mask, Tensor? text_mask,"
        " Tensor? image_weight, Tensor? text_weight, Tensor? scale, Tensor? bias, float factor, float offset,"
        " bool keep_best, bool keep_maxima, bool keep_means)"
        " -> (Tensor per_image, Tensor per_text, Tensor best_text, Tensor best_image, Tensor text_maxima,"
        " Tensor image_maxima, Tensor image_means, Tensor text_means,"
        " Tensor image_normalized_weight, Tensor text_normalized_weight)"
    )
    kernels = False
    results, differentiable = 2, 2

    @staticmethod
    def check(
        image_tokens: Tensor,
        text_tokens: Tensor,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_weight: Tensor | None = None,
        text_weight: Tensor | None = None,
        scale: float | Tensor = 1.0,
        bias: float | Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Numbers become ``factor`` and ``offset``; what is kept for backward follows from who needs a gradient."""
        image_mask, text_mask, scale, bias = check_token_logits(
            image_tokens,
            text_tokens,
            image_mask=image_mask,
            text_mask=text_mask,
            image_weight=image_weight,
            text_weight=text_weight,
            scale=scale,
            bias=bias,
        )
        recorded = torch.compiler.is_compiling() or torch.is_grad_enabled()
        keep_best = recorded and (image_tokens.requires_grad or text_tokens.requires_grad)
        keep_maxima = recorded and (_needs_gradient(image_weight) or _needs_gradient(text_weight))
        keep_means = recorded and _needs_gradient(scale)
        tokens = image_tokens, text_tokens, image_mask, text_mask, image_weight, text_weight
        scaling = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
        shift = (bias, 0.0) if isinstance(bias, Tensor) else (None, bias or 0.0)
        return *tokens, scaling[0], shift[0], scaling[1], shift[1], keep_best, keep_maxima, keep_means

    @staticmethod
    def compute(
        image_tokens: Tensor,
        text_tokens: Tensor,
        image_mask: Tensor | None,
        text_mask: Tensor | None,
        image_weight: Tensor | None,
        text_weight: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        factor: float,
        offset: float,
        keep_best: bool,
        keep_maxima: bool,
        keep_means: bool,
    ) -> tuple[Tensor, ...]:
        with _without_autocast(image_tokens):
            images, texts = in_one_dtype(image_tokens, text_tokens)
            image_normalized_weight, text_normalized_weight = (
                normalized_weights(images, image_mask, image_weight),
                normalized_weights(texts, text_mask, text_weight),
            )
            image_means, text_means, *kept = _token_maxima(
                images,
                texts,
                image_mask,
                text_mask,
                image_normalized_weight,
                text_normalized_weight,
                keep_best,
                keep_maxima,
            )
            scaling = (factor if scale is None else scale), (offset or None if bias is None else bias)
            logits = _scaled(image_means, *scaling), _scaled(text_means, *scaling)
        if not keep_means:
            image_means, text_means = image_means.new_empty(0), text_means.new_empty(0)
        return *logits, *kept, image_means, text_means, image_normalized_weight, text_normalized_weight

    @staticmethod
    def fake(image_tokens: Tensor, text_tokens: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        (batch, image_count, _), (text_batch, text_count, _) = image_tokens.shape, text_tokens.shape
        dtype = plain.compute_dtype(image_tokens)
        keep_best, keep_maxima, keep_means = arguments[-3:]

        def empty(*shape: int, kept: bool = True, dtype: torch.dtype = dtype) -> Tensor:
            return image_tokens.new_empty(shape if kept else (0,), dtype=dtype)

        # Comparing a symbolic count would be remembered as a condition on it, so it is done only where it matters.
        text_index, image_index = map(index_dtype, (text_count, image_count)) if keep_best else (torch.uint8,) * 2
        return (
            empty(batch, text_batch),
            empty(text_batch, batch),
            empty(batch, text_batch, image_count, kept=keep_best, dtype=text_index),
            empty(batch, text_batch, text_count, kept=keep_best, dtype=image_index),
            empty(batch, text_batch, image_count, kept=keep_maxima),
            empty(batch, text_batch, text_count, kept=keep_maxima),
            empty(batch, text_batch, kept=keep_means),
            empty(text_batch, batch, kept=keep_means),
            empty(batch, image_count),
            empty(text_batch, text_count),
        )

    @staticmethod
    def plain(*arguments: Any) -> tuple[Tensor, Tensor]:
        images, texts, image_mask, text_mask, image_weight, text_weight, scale, bias, factor, offset, *_ = arguments
        with _without_autocast(images):
            return _plain(
                images,
                texts,
                image_mask=image_mask,
                text_mask=text_mask,
                image_weight=image_weight,
                text_weight=text_weight,
                scale=factor if scale is None else scale,
                bias=(offset or None) if bias is None else bias,
            )

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        images, texts, image_mask, text_mask, image_weight, text_weight, scale, bias, ctx.factor, _, *keep = inputs
        images_need, texts_need, *weights_need, scale_needs, _ = needed(ctx, *DIFFERENTIABLE)
        wanted = images_need or texts_need, any(weights_need), scale_needs
        for name, kept, want in zip(("keep_best", "keep_maxima", "keep_means"), keep, wanted, strict=True):
            if want and not kept:
                raise ValueError(f"{name}: expected True where an argument needs a gradient of it, got False")
        ctx.save_for_backward(images, texts, image_mask, text_mask, image_weight, text_weight, scale, bias, *output[2:])

    @staticmethod
    def gradients(ctx: Any, grad_per_image: Tensor | None, grad_per_text: Tensor | None, *rest: Any) -> tuple:
        images, texts, image_mask, text_mask, image_weight, text_weight, scale, bias, *kept = ctx.saved_tensors
        needs = list(needed(ctx, *DIFFERENTIABLE))
        wanted = (images, texts, image_weight, text_weight, scale, bias)
        gradients = _token_logits_backward(
            grad_per_image,
            grad_per_text,
            images,
            texts,
            image_mask,
            text_mask,
            image_weight,
            text_weight,
            scale,
            bias,
            ctx.factor,
            *kept,
            needs,
        )
        found = iter(gradients)
        images, texts, image_weight, text_weight, scale, bias = (
            next(found).to(argument.device, argument.dtype) if need else None
            for argument, need in zip(wanted, needs, strict=True)
        )
        return images, texts, None, None, image_weight, text_weight, scale, bias


def _compute_backward(
    grad_per_image: Tensor | None,
    grad_per_text: Tensor | None,
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    image_weight: Tensor | None,
    text_weight: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    factor: float,
    best_text: Tensor,
    best_image: Tensor,
    text_maxima: Tensor,
    image_maxima: Tensor,
    image_means: Tensor,
    text_means: Tensor,
    image_normalized_weight: Tensor,
    text_normalized_weight: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of those of tokens, weights, scale and bias that need one."""
    with _without_autocast(image_tokens):
        images, texts = in_one_dtype(image_tokens, text_tokens)
        dtype, shape = plain.compute_dtype(images), (images.shape[0], texts.shape[0])
        if grad_per_image is None:
            grad_per_image = images.new_zeros(shape, dtype=dtype)
        if grad_per_text is None:
            grad_per_text = images.new_zeros(shape[::-1], dtype=dtype)
        of_scalars = []
        if needs[4]:
            terms = (grad_per_image * image_means).sum(), (grad_per_text * text_means).sum()
            of_scalars.append(_total(scale, *terms))
        if needs[5]:
            of_scalars.append(_total(bias, grad_per_image.sum(), grad_per_text.sum()))
        scaling = factor if scale is None else scale
        grad_per_image, grad_per_text = _scaled(grad_per_image, scaling), _scaled(grad_per_text, scaling)
        results = []
        if needs[0]:
            arguments = (
                texts,
                image_mask,
                text_mask,
                image_normalized_weight,
                text_normalized_weight,
                best_text,
                best_image,
            )
            results.append(_token_maxima_backward(grad_per_image, grad_per_text, *arguments))
        if needs[1]:
            maps = best_image.transpose(0, 1), best_text.transpose(0, 1)
            arguments = images, text_mask, image_mask, text_normalized_weight, image_normalized_weight, *maps
            results.append(_token_maxima_backward(grad_per_text, grad_per_image, *arguments))
        if needs[2]:
            grad_normalized_weight = torch.einsum("bc,bcn->bn", grad_per_image, text_maxima)
            results.append(_weight_gradient(grad_normalized_weight, image_mask, image_weight))
        if needs[3]:
            grad_normalized_weight = torch.einsum("cb,bcm->cm", grad_per_text, image_maxima)
            results.append(_weight_gradient(grad_normalized_weight, text_mask, text_weight))
        return results + of_scalars


def _fake_backward(*arguments: Any) -> list[Tensor]:
    images, texts, _, _, image_weight, text_weight, scale, bias = arguments[2:10]
    needs, dtype = arguments[-1], plain.compute_dtype(images)
    tokens = torch.promote_types(images.dtype, texts.dtype)
    shapes = (
        (images.shape, tokens),
        (texts.shape, tokens),
        (None if image_weight is None else image_weight.shape, dtype),
        (None if text_weight is None else text_weight.shape, dtype),
        ((), None if scale is None else scale.dtype),
        ((), None if bias is None else bias.dtype),
    )
    return [images.new_empty(shape, dtype=kind) for (shape, kind), need in zip(shapes, needs, strict=True) if need]


def _scaled(mean: Tensor, scale: float | Tensor, bias: float | Tensor | None = None) -> Tensor:
    """`affine`, without the pass over the logits that a scale of 1 would cost."""
    return mean if bias is None and not isinstance(scale, Tensor) and scale == 1 else affine(mean, scale, bias)


def _weight_gradient(grad_normalized_weight: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    """The gradient of the weights ``[B, N]``, given that of the normalized ones, ``w / Σ w``: 0 where the sum is."""
    assert weight is not None
    weight = weight.to(grad_normalized_weight.dtype)
    if mask is not None:
        weight = weight.masked_fill(~mask, 0)
    total = weight.sum(dim=1, keepdim=True)
    empty = total == 0
    safe, grad_normalized_weight = total.masked_fill(empty, 1), grad_normalized_weight.masked_fill(empty, 0)
    grad_total = (-grad_normalized_weight * ((weight / safe) / safe)).sum(dim=1, keepdim=True).masked_fill(empty, 0)
    gradient = grad_normalized_weight / safe + grad_total
    return gradient if mask is None else gradient.masked_fill(~mask, 0)


def _total(argument: Tensor | None, per_image: Tensor, per_text: Tensor) -> Tensor:
    """The gradient of a scalar argument from both directions, added in its dtype as autograd adds."""
    assert argument is not None
    return per_image.to(argument.dtype) + per_text.to(argument.dtype)


def _needs_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _without_autocast(tensor: Tensor) -> AbstractContextManager:
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if autocast_enabled(kind) else nullcontext()


_token_logits, _plain = TokenLogits.call, plain.token_logits
_token_maxima = define_kernel(
    "contrastive_token_maxima(Tensor image_tokens, Tensor text_tokens, Tensor? image_mask, Tensor? text_mask,"
    " Tensor image_normalized_weight, Tensor text_normalized_weight, bool keep_best, bool keep_maxima)"
    " -> (Tensor per_image, Tensor per_text, Tensor best_text, Tensor best_image,"
    " Tensor text_maxima, Tensor image_maxima)",
    reference=plain.token_maxima,
    triton="mlip_kernels.triton.contrastive.token_maxima:token_maxima",
)
_token_maxima_backward = define_kernel(
    "contrastive_token_maxima_backward(Tensor grad_mean, Tensor grad_other_mean, Tensor other_tokens, Tensor? mask,"
    " Tensor? other_mask, Tensor normalized_weight, Tensor other_normalized_weight, Tensor best_other, Tensor best)"
    " -> Tensor grad_tokens",
    reference=plain.token_maxima_backward,
    triton="mlip_kernels.triton.contrastive.token_maxima_backward:token_maxima_backward",
)
_token_logits_backward = define_backward(
    "token_logits_backward(Tensor? grad_per_image, Tensor? grad_per_text, Tensor image_tokens, Tensor text_tokens,"
    " Tensor? image_mask, Tensor? text_mask, Tensor? image_weight, Tensor? text_weight, Tensor? scale, Tensor? bias,"
    " float factor, Tensor best_text, Tensor best_image, Tensor text_maxima, Tensor image_maxima, Tensor image_means,"
    " Tensor text_means, Tensor image_normalized_weight, Tensor text_normalized_weight, bool[] needs) -> Tensor[]",
    compute=_compute_backward,
    fake=_fake_backward,
    kernels=False,
)
