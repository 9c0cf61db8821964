"""Small vision transformers of timm, and images for them."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

TINY: dict[str, Any] = {"embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": 64, "num_classes": 7}


def perturbed(model: nn.Module) -> nn.Module:
    """Parameters that start at 0 or 1 hide what is left out."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def tiny(name: str = "vit_small_patch16_224", **changed: Any) -> nn.Module:
    torch.manual_seed(1)
    return perturbed(timm.create_model(name, **(TINY | changed)))


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(2))
