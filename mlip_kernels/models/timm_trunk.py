"""timm's vision transformers as the image tower of an `MLIP`, and the tower as a model of timm."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm, PatchEmbed
from timm.layers.activations import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mlip_kernels.models.config import ImageConfig, MLIPConfig
from mlip_kernels.models.open_clip_names import TRUNK

BASES = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}
"""timm's architecture with norms of this epsilon, which its arguments cannot change."""


def trunk_arguments(config: ImageConfig) -> dict[str, Any]:
    """Arguments of timm's ``VisionTransformer``, all plain values; the epsilon of its norms is not among them."""
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "drop_path_rate": config.drop_path,
        "pre_norm": config.pre_norm,
        "act_layer": None if config.activation == "gelu" else config.activation,
    }


def image_config(trunk: Any, name: str = "model") -> ImageConfig:
    """What `ImageConfig` builds ``trunk``.

    Args:
        trunk: timm's ``VisionTransformer`` with a class token; its head is not looked at.
        name: of ``trunk``, for messages.

    Raises:
        TypeError, ValueError: if there is none; names the part.
    """
    if type(trunk) is not VisionTransformer:
        raise TypeError(
            f"{name}: expected timm's VisionTransformer, got {type(trunk).__name__} "
            "(mlip_kernels.patch.timm.remove takes a patch off)"
        )
    for part, plain in (("num_prefix_tokens", 1), ("has_class_token", True), ("no_embed_class", False)):
        if getattr(trunk, part) != plain:
            raise ValueError(f"{name}.{part}: expected {plain}, got {getattr(trunk, part)}")
    if trunk.global_pool not in ("token", "avg") or not isinstance(trunk.fc_norm, nn.Identity):
        raise ValueError(
            f"{name}.global_pool: expected 'token', or 'avg' behind the norm, got {trunk.global_pool!r} with fc_norm "
            f"{trunk.fc_norm}; create the model with global_pool='token', fc_norm=False"
        )
    if type(trunk.patch_embed) is not PatchEmbed or trunk.pos_embed is None:
        raise ValueError(f"{name}.patch_embed: expected timm's PatchEmbed with learned positions")
    sides = (*trunk.patch_embed.img_size, *trunk.patch_embed.patch_size)
    if sides[0] != sides[1] or sides[2] != sides[3]:
        raise ValueError(f"{name}.patch_embed: expected square images and patches, got {sides[:2]} and {sides[2:]}")
    block: Any = trunk.blocks[0]
    config = ImageConfig(
        image_size=sides[0],
        patch_size=sides[2],
        width=trunk.embed_dim,
        depth=len(trunk.blocks),
        heads=block.attn.num_heads,
        mlp_ratio=mlp_ratio(block.mlp.fc1.out_features, trunk.embed_dim),
        drop_path=float(getattr(trunk.blocks[-1].drop_path1, "drop_prob", 0.0)),
        pool="token" if trunk.global_pool == "token" else "avg",
        pre_norm=not isinstance(trunk.norm_pre, nn.Identity),
        norm_epsilon=getattr(trunk.norm, "eps", 1e-6),
        activation="quick_gelu" if isinstance(block.mlp.act, QuickGELU) else "gelu",
    )
    with torch.device("meta"):
        norm = partial(LayerNorm, eps=config.norm_epsilon)
        wanted = VisionTransformer(**trunk_arguments(config), norm_layer=norm, num_classes=0)
    for part in ("patch_embed", "patch_drop", "norm_pre", "blocks", "norm"):
        check_same_structure(f"{name}.{part}", getattr(trunk, part), getattr(wanted, part))
    return config


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio whose product with ``width``, rounded down as both libraries do, is ``hidden``."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)


def trunk_state(trunk: nn.Module) -> dict[str, Tensor]:
    """The parameters that an `MLIP` has in its trunk, copied and by their names there: all but the head."""
    state = trunk.state_dict()
    return {TRUNK + name: value.detach().cpu().clone() for name, value in state.items() if not name.startswith("head.")}


def timm_config(config: MLIPConfig) -> tuple[str, dict[str, Any]]:
    """An architecture of timm and its arguments that give the image tower of ``config`` with its projection as head.

    Raises:
        ValueError: if there is none; names the field.
    """
    config.check_plain_tower()
    if config.image.norm_epsilon not in BASES:
        raise ValueError(
            f"ImageConfig.norm_epsilon: timm's architectures have {sorted(BASES)}, got {config.image.norm_epsilon}"
        )
    arguments = {name: value for name, value in trunk_arguments(config.image).items() if value is not None}
    arguments["global_pool"] = config.image.pool
    arguments["fc_norm"] = False
    return BASES[config.image.norm_epsilon], arguments


def timm_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image tower of an `MLIP` under timm's names; the projection is a head with a bias of 0."""
    result = {name.removeprefix(TRUNK): value for name, value in state.items() if name.startswith(TRUNK)}
    head = state["visual_projection.weight"]
    return {**result, "head.weight": head, "head.bias": torch.zeros_like(head[:, 0])}


def check_same_structure(name: str, found: nn.Module, wanted: nn.Module) -> None:
    """Raise unless two modules read alike, part by part.

    Raises:
        ValueError: names the first line that differs.
    """
    lines, expected = repr(found).splitlines(), repr(wanted).splitlines()
    for line, other in zip(lines, expected, strict=False):
        if line != other:
            raise ValueError(f"{name}: an MLIP has no {line.strip()} here, but {other.strip()}")
    if len(lines) != len(expected):
        raise ValueError(f"{name}: expected {len(expected)} parts, got {len(lines)}")
