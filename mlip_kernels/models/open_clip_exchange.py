"""Models of open_clip as an `MLIP`, and an `MLIP` as a model of open_clip: the towers, to float32 rounding.

model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained="laion2b_s34b_b79k")
mlip = mlip_kernels.models.from_open_clip(model)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP, get_model_preprocess_cfg, set_model_preprocess_cfg
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from torch import nn

from mlip_kernels.data.batch import VOCABULARY
from mlip_kernels.models.config import Activation, ImageConfig, MLIPConfig, TextConfig
from mlip_kernels.models.folder import fill
from mlip_kernels.models.mlip import MLIP
from mlip_kernels.models.open_clip_names import ours, theirs
from mlip_kernels.models.preprocessing import Preprocessing
from mlip_kernels.models.timm_trunk import check_same_structure, image_config, mlp_ratio

TEXT_EPSILON, TEXT_MLP_RATIO = 1e-5, 4.0
"""Of every `TextConfig`."""


def from_open_clip(model: nn.Module, like: MLIPConfig | None = None) -> MLIP:
    """A model of open_clip as an `MLIP` with copies of its parameters, on the CPU and in evaluation mode.

    With ``keep_rate=1`` its features are those of ``model``, to float32 rounding.

    Args:
        model: a ``CLIP`` or ``CustomTextCLIP`` with open_clip's own vision transformer, or a ``TimmModel`` around
            timm's, and with CLIP's text tower.
        like: what the towers do not say: frequency, merging, loss and ``drop_path``. Parameters that only these need
            are drawn at random. By default nothing of it: plain CLIP.

    Raises:
        TypeError, ValueError: if ``model`` is of another kind, or has a part that an `MLIP` cannot express; names it.
    """
    config = mlip_config(model, like)
    kinds = {parameter.dtype for parameter in model.parameters()}
    if kinds != {torch.float32}:
        raise ValueError(
            f"model: expected float32 parameters, got {', '.join(sorted(map(str, kinds)))}; create it with "
            "precision='fp32'"
        )
    preprocessing = Preprocessing.from_dict({**get_model_preprocess_cfg(model), "size": config.image.image_size})
    result = MLIP(config, preprocessing)
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    fill(result, {**result.state_dict(), **ours(state, patch_bias=not config.image.pre_norm)}, "model")
    return result.eval()


def mlip_config(model: nn.Module, like: MLIPConfig | None = None) -> MLIPConfig:
    """The configuration whose towers are those of ``model``; arguments and errors are those of `from_open_clip`."""
    if type(model) not in (CLIP, CustomTextCLIP):
        raise TypeError(
            f"model: expected open_clip's CLIP or CustomTextCLIP, got {type(model).__name__}; a compiled or "
            "distributed one is at its .module or ._orig_mod"
        )
    if getattr(model, "logit_bias", None) is not None:
        raise ValueError("model.logit_bias: an MLIP has none, as its terms are softmax contrastive, not SigLIP's")
    like = MLIPConfig().clip() if like is None else like
    visual: Any = model.visual
    image = _image_config(visual, like.image.drop_path)
    embed_dim = visual.head.proj.out_features if isinstance(visual, TimmModel) else visual.output_dim
    config = dataclasses.replace(like, image=image, text=_text_config(model), embed_dim=int(embed_dim))
    _check_structure(model, config)
    return config


def to_open_clip(model: MLIP) -> CLIP:
    """The towers of ``model`` as open_clip's ``CLIP``, with copies of the parameters, on the CPU and in evaluation
    mode.

    Its features are those of ``model`` without merging, to float32 rounding; `mlip_kernels.patch.open_clip` brings
    merging back. Frequency Stage and token projections, which serve training, stay behind.

    Raises:
        TypeError: if ``model`` is no `MLIP`.
        ValueError: if its image feature passes a part that open_clip's model has not; names the field.
    """
    if not isinstance(model, MLIP):
        raise TypeError(f"model: expected MLIP, got {type(model).__name__}")
    with torch.device("meta"):
        result = CLIP(**open_clip_config(model.config))
    state = {name: value.detach().cpu().clone() for name, value in theirs(model.state_dict()).items()}
    result.load_state_dict(state, assign=True)
    result.attn_mask = model.text.build_causal_mask()
    set_model_preprocess_cfg(result, {**model.preprocessing.to_dict(), "mode": "RGB"})
    return result.eval()


def open_clip_config(config: MLIPConfig) -> dict[str, Any]:
    """The ``model_cfg`` of open_clip whose model has the towers of ``config``.

    Raises:
        ValueError: if there is none; names the field.
    """
    config.check_plain_tower()
    image, text = config.image, config.text
    if image.activation != text.activation:
        raise ValueError(
            f"ImageConfig.activation: open_clip has one activation for both towers, got {image.activation!r} and "
            f"TextConfig.activation={text.activation!r}"
        )
    vision: dict[str, Any] = {
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "width": image.width,
        "layers": image.depth,
        "head_width": image.width // image.heads,
        "mlp_ratio": image.mlp_ratio,
    }
    if not image.pre_norm:
        vision["no_ln_pre"] = True
    if image.pool == "avg":
        vision["pool_type"] = "avg"
    if image.norm_epsilon != TEXT_EPSILON:
        vision["norm_kwargs"] = {"eps": image.norm_epsilon}
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": image.activation == "quick_gelu",
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocabulary,
            "width": text.width,
            "heads": text.heads,
            "layers": text.depth,
        },
    }


def _image_config(visual: Any, drop_path: float) -> ImageConfig:
    if type(visual) is TimmModel:
        image = image_config(visual.trunk, "model.visual.trunk")
        head = dict(visual.head.named_children())
        if set(head) - {"drop"} != {"proj"} or not isinstance(head["proj"], nn.Linear) or head["proj"].bias is not None:
            raise ValueError(f"model.visual.head: expected a linear projection without a bias, got {visual.head}")
        return image
    if type(visual) is not VisionTransformer:
        raise TypeError(
            f"model.visual: expected open_clip's VisionTransformer or TimmModel, got {type(visual).__name__} "
            "(mlip_kernels.patch.open_clip.remove takes a patch off)"
        )
    if visual.attn_pool is not None:
        raise ValueError("model.visual.attn_pool: an MLIP takes the class token or the mean, not attentional pooling")
    if visual.pool_type not in ("tok", "avg") or (visual.final_ln_after_pool and visual.pool_type == "avg"):
        raise ValueError(
            f"model.visual.pool_type: expected 'tok', or 'avg' behind the norm, got {visual.pool_type!r} with "
            f"final_ln_after_pool={visual.final_ln_after_pool}"
        )
    if not isinstance(visual.patch_dropout, nn.Identity):
        raise ValueError("model.visual.patch_dropout: an MLIP has none; create the model with force_patch_dropout=0.0")
    for name in ("image_size", "patch_size"):
        height, width = getattr(visual, name)
        if height != width:
            raise ValueError(f"model.visual.{name}: expected a square, got {height} x {width}")
    width, ratio, heads, activation = _blocks(visual.transformer, "model.visual.transformer")
    return ImageConfig(
        image_size=visual.image_size[0],
        patch_size=visual.patch_size[0],
        width=width,
        depth=len(visual.transformer.resblocks),
        heads=heads,
        mlp_ratio=ratio,
        drop_path=drop_path,
        pool="token" if visual.pool_type == "tok" else "avg",
        pre_norm=not isinstance(visual.ln_pre, nn.Identity),
        norm_epsilon=visual.ln_post.eps,
        activation=activation,
    )


def _text_config(model: Any) -> TextConfig:
    text = model.text if isinstance(model, CustomTextCLIP) else model
    if isinstance(model, CustomTextCLIP) and type(text) is not TextTransformer:
        raise TypeError(f"model.text: expected open_clip's TextTransformer, got {type(text).__name__}")
    pool = text.pool_type if isinstance(text, TextTransformer) else text.text_pool_type
    if pool != "argmax" or text.attn_mask is None or getattr(text, "cls_emb", None) is not None:
        raise ValueError(
            f"model.text: expected CLIP's causal tower, which pools at the end of text, got pool_type={pool!r}, "
            f"{'a' if text.attn_mask is not None else 'no'} causal mask"
        )
    if text.vocab_size != VOCABULARY:
        raise ValueError(
            f"model.text.vocab_size: expected the {VOCABULARY} entries of CLIP's tokenizer, got {text.vocab_size}"
        )
    if not isinstance(text.text_projection, nn.Parameter):
        raise ValueError("model.text.text_projection: expected a matrix, as CLIP has it, got none or a bias")
    width, ratio, heads, activation = _blocks(text.transformer, "model.text.transformer")
    if ratio != TEXT_MLP_RATIO:
        raise ValueError(f"model.text: expected an mlp_ratio of {TEXT_MLP_RATIO}, got {ratio}")
    return TextConfig(
        context_length=text.context_length,
        vocabulary=text.vocab_size,
        width=width,
        depth=len(text.transformer.resblocks),
        heads=heads,
        activation=activation,
    )


def _blocks(transformer: Any, name: str) -> tuple[int, float, int, Activation]:
    """Width, MLP ratio, heads and activation of open_clip's transformer, read in its first block."""
    block = transformer.resblocks[0]
    attention, mlp = block.attn, block.mlp
    if type(attention) is not nn.MultiheadAttention:
        raise TypeError(f"{name}.resblocks[0].attn: expected MultiheadAttention, got {type(attention).__name__}")
    activations: dict[type, Activation] = {nn.GELU: "gelu", QuickGELU: "quick_gelu"}
    if type(mlp.gelu) not in activations:
        raise TypeError(f"{name}.resblocks[0].mlp.gelu: expected GELU or QuickGELU, got {type(mlp.gelu).__name__}")
    width = attention.embed_dim
    return width, mlp_ratio(mlp.c_fc.out_features, width), attention.num_heads, activations[type(mlp.gelu)]


def _check_structure(model: Any, config: MLIPConfig) -> None:
    """Raise unless every module of the towers is what it is in a model of ``config``."""
    plain = dataclasses.replace(config, frequency=MLIPConfig().frequency)
    image, text = config.image, config.text
    if isinstance(model.visual, TimmModel):  # whose trunk is compared where it is read
        same = dataclasses.replace(image, activation=text.activation)
        plain = dataclasses.replace(plain, image=same)
    with torch.device("meta"):
        expected = CLIP(**open_clip_config(plain))
    parts = {"model.text": (model.text if isinstance(model, CustomTextCLIP) else model, expected)}
    pairs = [
        (f"{name}.{part}", getattr(found, part), getattr(wanted, part))
        for name, (found, wanted) in parts.items()
        for part in ("token_embedding", "transformer", "ln_final")
    ]
    if not isinstance(model.visual, TimmModel):
        pairs.append(("model.visual", model.visual, expected.visual))
    for name, found, wanted in pairs:
        check_same_structure(name, found, wanted)
