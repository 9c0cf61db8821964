"""Small vision models of Hugging Face, and inputs for them."""

from typing import Any

import torch
from tiny_vit import perturbed
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 8,
}
MODELS: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "CLIP": (CLIPVisionModel, CLIPVisionConfig, {"image_size": 32}),
    "SigLIP": (SiglipVisionModel, SiglipVisionConfig, {"image_size": 32}),
    "SigLIP 2": (Siglip2VisionModel, Siglip2VisionConfig, {"num_patches": 16}),
}


def tiny(name: str, **changed: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    model, config, sizes = MODELS[name]
    return perturbed(model(config(**(SIZES | sizes | changed))))


def whole(**changed: Any) -> CLIPConfig:
    """The configuration of a CLIP with both towers."""
    text = {**SIZES, "vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 63}
    del text["patch_size"]
    return CLIPConfig(text_config=text, vision_config=SIZES | {"image_size": 32}, projection_dim=16, **changed)


def inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    if name != "SigLIP 2":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator).to(dtype)}
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, 12:] = mask[1, 16:] = 0
    return {
        "pixel_values": torch.randn(2, 20, 192, generator=generator).to(dtype),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[3, 4], [4, 4]]),
    }
