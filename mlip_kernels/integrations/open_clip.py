"""open_clip's training script with merging towers and losses of this package.

    python -m mlip_kernels.integrations.open_clip --merge-keep-rate 0.7 --token-weight 1.0 \\
        --model ViT-B-16 --train-data pairs.csv ...

runs ``open_clip_train.main`` with all of its options, checkpoints and logs. Its script looks up two functions, one that
makes the model and one that makes the loss; `main` puts `create_model_and_transforms` and `create_loss` of this module
in their place. State dicts stay open_clip's: what is saved loads into plain ``open_clip.create_model``.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlip_kernels import weighted_mean
from mlip_kernels._extras import needing
from mlip_kernels.nn import ClipLoss, SigLipLoss, TokenContrastiveLoss
from mlip_kernels.patch import open_clip as patch  # says which package is missing

import open_clip  # isort: skip
from open_clip.model import CLIP, CustomTextCLIP  # isort: skip
from open_clip.transformer import TextTransformer, text_global_pool  # isort: skip

__all__ = ["TokenLoss", "create_loss", "create_model_and_transforms", "main", "with_tokens"]


def with_tokens(model: nn.Module) -> nn.Module:
    """Let a patched open_clip model return tokens beside features, in place: what `TokenLoss` takes.

    ``model(images, texts)`` then returns a dictionary with open_clip's ``image_features``, ``text_features``,
    ``logit_scale`` (and ``logit_bias``), and with

    * ``image_tokens [B, N', E]`` and ``text_tokens [B, M, E]``, projected and of unit length; class token left out;
    * ``image_weight [B, N']``, the patches each image token stands for, where tokens merge;
    * ``text_mask [B, M]``, True up to the end of each text, where the model knows it.

    All of them have the batch first and the same shape in every batch, so ``--accum-freq`` can concatenate them.

    Raises:
        TypeError: it is no ``CLIP`` or ``CustomTextCLIP`` with open_clip's own towers, or it is not patched.
        ValueError: its image tower pools with attention, behind which there are no tokens of patches.
    """
    kind = _TOKENS.get(type(model))
    if kind is None:
        raise TypeError(f"model: expected open_clip's CLIP or CustomTextCLIP, got {type(model).__name__}")
    visual, text = model.visual, getattr(model, "text", model)
    if not isinstance(visual, patch.MergingVisionTransformer):
        raise TypeError(
            f"model.visual: expected open_clip's VisionTransformer after mlip_kernels.patch.open_clip.apply, got"
            f" {type(visual).__name__}"
        )
    if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg") or visual.final_ln_after_pool:
        raise ValueError("model.visual: expected one that normalises its tokens and pools 'tok' or 'avg', got another")
    if not isinstance(text, (CLIP, TextTransformer)) or getattr(text, "cls_emb", None) is not None:
        raise TypeError(
            f"model.text: expected open_clip's TextTransformer without a class token, got {type(text).__name__}"
        )
    model.__class__ = kind
    return model


class _WithTokens(nn.Module):
    logit_scale: Any
    logit_bias: Any

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> Any:
        """open_clip's forward, where one of the two is missing; else what `with_tokens` says."""
        if image is None or text is None:
            return super().forward(image, text)
        image_features, image_tokens, image_weight = _of_images(self.visual, image)
        text_features, text_tokens, text_mask = _of_texts(getattr(self, "text", self), text)
        found = {
            "image_features": F.normalize(image_features, dim=-1),
            "text_features": F.normalize(text_features, dim=-1),
            "logit_scale": self.logit_scale.exp(),
            "image_tokens": F.normalize(image_tokens, dim=-1),
            "text_tokens": F.normalize(text_tokens, dim=-1),
        }
        given = {"logit_bias": self.logit_bias, "image_weight": image_weight, "text_mask": text_mask}
        return found | {name: value for name, value in given.items() if value is not None}


def _of_images(visual: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features, merged tokens and their sizes."""
    tokens, size, _ = visual(images, merged=True)
    pooled = tokens[:, 0] if visual.pool_type == "tok" else weighted_mean(tokens, size, prefix_tokens=1)
    return pooled @ visual.proj, tokens[:, 1:] @ visual.proj, None if size is None else size[:, 1:]


def _of_texts(text: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features, tokens and which of them are text."""
    if isinstance(text, CLIP):
        dtype = text.transformer.get_cast_dtype()
        x, mask = text.token_embedding(ids).to(dtype) + text.positional_embedding.to(dtype), text.attn_mask
        pool_type, end = text.text_pool_type, getattr(text, "text_eos_id", None)
    else:
        x, mask = text._embeds(ids)
        pool_type, end = text.pool_type, getattr(text, "eos_id", None)
    x = text.ln_final(text.transformer(x, attn_mask=mask))
    pooled = text_global_pool(x, ids, pool_type, eos_token_id=end)
    projection = text.text_projection
    if isinstance(projection, nn.Linear):
        pooled, x = projection(pooled), projection(x)
    elif projection is not None:
        pooled, x = pooled @ projection, x @ projection
    if pool_type not in ("argmax", "eos"):
        return pooled, x, None
    last = ids.argmax(-1) if pool_type == "argmax" else (ids == torch.full_like(ids, end or 0)).int().argmax(-1)
    return pooled, x, torch.arange(ids.shape[1], device=ids.device) <= last[:, None]


class CLIPWithTokens(_WithTokens, CLIP):
    """open_clip's ``CLIP`` that returns tokens beside features."""


class CustomTextCLIPWithTokens(_WithTokens, CustomTextCLIP):
    """open_clip's ``CustomTextCLIP`` that returns tokens beside features."""


_TOKENS: dict[type[nn.Module], type[nn.Module]] = {
    CLIP: CLIPWithTokens,
    CustomTextCLIP: CustomTextCLIPWithTokens,
    CLIPWithTokens: CLIPWithTokens,
    CustomTextCLIPWithTokens: CustomTextCLIPWithTokens,
}


class TokenLoss(nn.Module):
    """A loss on features plus a token-level one, on what a model `with_tokens` returns.

    Args:
        features: the loss on features, as ``loss(image_features, text_features, logit_scale, …, output_dict=True)``.
        weight: factor of the token-level loss.
        rank, world_size: of this process among those that share the batch.
    """

    def __init__(self, features: nn.Module, weight: float = 1.0, rank: int = 0, world_size: int = 1) -> None:
        super().__init__()
        self.features = features
        self.tokens = TokenContrastiveLoss(rank=rank, world_size=world_size)
        self.weight = weight

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        image_tokens: Tensor,
        text_tokens: Tensor,
        *,
        image_weight: Tensor | None = None,
        text_mask: Tensor | None = None,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """``{"contrastive_loss": …, "token_loss": weight · …}``, or their sum.

        The token-level loss shares the scale of the features and has no bias.
        """
        bias = {} if logit_bias is None else {"logit_bias": logit_bias}
        losses = self.features(image_features, text_features, logit_scale, **bias, output_dict=True)
        tokens = self.tokens(image_tokens, text_tokens, logit_scale, image_weight=image_weight, text_mask=text_mask)
        losses = {**losses, "token_loss": self.weight * tokens}
        return losses if output_dict else sum(losses.values())


def create_loss(args: argparse.Namespace, token_weight: float = 0.0) -> nn.Module:
    """What ``open_clip.create_loss(args)`` makes, of this package where it has the loss.

    Raises:
        ValueError: ``token_weight`` is given for a distilled model or CoCa, whose losses take no tokens.
    """
    if args.distill or "coca" in args.model.lower():
        if token_weight:
            raise ValueError("token-weight: expected 0 with --distill and CoCa, whose losses take no tokens")
        return open_clip.create_loss(args)
    ranks = {"rank": args.rank, "world_size": args.world_size}
    loss: nn.Module
    if args.siglip:
        loss = SigLipLoss(dist_impl=args.loss_dist_impl, **ranks)
    else:
        loss = ClipLoss(
            local_loss=args.local_loss,
            gather_with_grad=args.gather_with_grad,
            cache_labels=True,
            use_horovod=args.horovod,
            **ranks,
        )
    return TokenLoss(loss, token_weight, **ranks) if token_weight else loss


def create_model_and_transforms(
    *arguments: Any,
    merging: dict[str, Any] | None = None,
    tokens: bool = False,
    **options: Any,
) -> tuple[nn.Module, Any, Any]:
    """What ``open_clip.create_model_and_transforms`` makes, patched.

    Args:
        merging: arguments of `mlip_kernels.patch.open_clip.apply`.
        tokens: whether the model returns tokens (`with_tokens`).
    """
    model, preprocess_train, preprocess_val = open_clip.create_model_and_transforms(*arguments, **options)
    patch.apply(model, **(merging or {}))
    return with_tokens(model) if tokens else model, preprocess_train, preprocess_val


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``open_clip_train.main`` with the options of this module taken out of its arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m mlip_kernels.integrations.open_clip",
        description="open_clip's training script with token merging and losses of mlip_kernels.",
        epilog="All other options are those of open_clip_train.main.",
        allow_abbrev=False,
    )
    parser.add_argument("--merge-r", type=int, default=0, help="tokens to merge in every block of the image tower")
    parser.add_argument("--merge-keep-rate", type=float, help="instead: share of patch tokens to keep")
    parser.add_argument("--merge-layers", type=int, nargs="+", help="blocks that merge under --merge-keep-rate")
    parser.add_argument("--merge-guide", choices=("spatial", "key_norm", "frequency", "both"))
    parser.add_argument("--token-weight", type=float, default=0.0, help="factor of a token-level loss; 0 for none")
    ours, theirs = parser.parse_known_args(arguments)
    merging = {
        "r": ours.merge_r,
        "keep_rate": ours.merge_keep_rate,
        "layers": ours.merge_layers,
        "guide": ours.merge_guide,
    }
    with needing("integrations", "open_clip's training script"):
        from open_clip_train import main as script  # takes long to import

    make = functools.partial(create_model_and_transforms, merging=merging, tokens=ours.token_weight > 0)
    theirs_of_script = script.create_model_and_transforms, script.create_loss
    script.create_model_and_transforms = make
    script.create_loss = functools.partial(create_loss, token_weight=ours.token_weight)
    try:
        script.main(theirs)
    finally:
        script.create_model_and_transforms, script.create_loss = theirs_of_script


if __name__ == "__main__":
    main()
