"""Small image towers of open_clip, and images for them."""

from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from tiny_vit import perturbed
from torch import Tensor

SIZES: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "width": 32,
    "layers": 3,
    "heads": 2,
    "mlp_ratio": 2.0,
    "output_dim": 32,
}
TOWERS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average": {"pool_type": "avg"},
    "all tokens": {"pool_type": "none"},
    "norm behind pooling": {"pool_type": "avg", "final_ln_after_pool": True},
    "attention pool": {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2},
    "parallel attention pools": {"attentional_pool": "parallel", "attn_pooler_heads": 2},
    "attention pools in a row": {"attentional_pool": "cascade", "attn_pooler_heads": 2},
    "custom blocks": {
        "qk_norm": True,
        "scale_heads": True,
        "scale_attn_inner": True,
        "scale_attn": True,
        "scale_fc": True,
    },
    "LayerScale": {"ls_init_value": 0.5, "no_ln_pre": True},
    "fixed positions": {"pos_embed_type": "sin_cos_2d"},
    "both outputs": {"output_tokens": True},
    "rectangular": {"image_size": (32, 48)},
}


def tiny(name: str = "class token", **changed: Any) -> VisionTransformer:
    torch.manual_seed(1)
    return perturbed(VisionTransformer(**(SIZES | TOWERS[name] | changed)))


def images(tower: VisionTransformer, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *tower.image_size, generator=torch.Generator().manual_seed(2))
