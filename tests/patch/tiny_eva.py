"""Small EVA-type transformers of timm."""

from typing import Any

import timm
import torch
from timm.models.eva import Eva, EvaAttention
from tiny_vit import TINY, perturbed
from torch import nn

NAMED: dict[str, dict[str, Any]] = {
    "eva_giant_patch14_224": {"patch_size": 16},  # absolute positions alone
    "eva02_tiny_patch14_224": {"patch_size": 16},  # rotary positions, SwiGLU
    "eva02_base_patch16_clip_224": {},  # norms inside attention and MLP, queries, keys and values apart
    "vit_medium_patch16_rope_reg1_gap_256": {},  # no class token, average pooling
    "vit_pe_core_tiny_patch16_384": {},  # attention pooling, norm before the blocks
    "vit_small_patch16_rope_mixed_224": {},  # a table for each block and head
    "vit_small_patch16_rope_mixed_ape_224": {},
    "vit_small_plus_patch16_dinov3_qkvb": {},  # registers, LayerScale, rotation by halves
    "vit_base_patch16_sapiens2": {"num_heads": 4, "num_kv_heads": 2},  # grouped-query attention
}
BUILT: dict[str, dict[str, Any]] = {
    "norms behind the branches": {"use_post_norm": True, "swiglu_mlp": True},
    "AttentionRope": {"attn_type": "rope", "qk_norm": True, "swiglu_mlp": True, "swiglu_align_to": 8},
    "three-axis positions": {"rope_type": "mrope", "init_values": 0.5},
    "any image size": {"dynamic_img_size": True},
    "class token for a head": {"global_pool": "token"},
    "patches dropped": {"patch_drop_rate": 0.25},
    "patches dropped, a table for each block": {"patch_drop_rate": 0.25, "rope_type": "mixed"},
    "gates": {},
}


def tiny(name: str = "eva02_tiny_patch14_224", **changed: Any) -> nn.Module:
    torch.manual_seed(1)
    if name in NAMED:
        return perturbed(timm.create_model(name, **(TINY | NAMED[name] | changed)))
    model = Eva(**(TINY | {"patch_size": 16, "use_rot_pos_emb": True} | BUILT[name] | changed))
    if name == "gates":
        for block in model.blocks:
            block.attn = EvaAttention(48, 3, gated=True, scale_norm=False, qkv_bias_separate=True)
    return perturbed(model)
