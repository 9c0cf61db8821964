"""The contrastive terms of MLIP: {global, token} × {spatial, frequency}.

``L = L_g^S + λ_F·L_g^F + λ_t·(L_t^S + L_t^F)/2`` with InfoNCE per term, each with its own learned temperature.
Global terms compare one feature an image with one a caption (CLIP); token terms compare by the mean of maximal
similarities (FILIP, arXiv 2111.07783).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlip_kernels.models.config import LossConfig
from mlip_kernels.models.features import MLIPFeatures
from mlip_kernels.nn.losses import ClipLoss, TokenContrastiveLoss


class MLIPLoss(nn.Module):
    """Weighted sum of the contrastive terms over `MLIPFeatures`.

    In a process group every rank computes the terms of its own images and captions against those of all ranks; the
    mean of the ranks' losses is the loss of the whole batch, so gradients averaged by DDP are those of one process.

    Args:
        config: weights and choices.
        rank: of this process.
        world_size: processes that share the batch.
        gather: how caption tokens travel between processes, ``"all"`` or ``"ring"``; see `TokenContrastiveLoss`.
    """

    def __init__(self, config: LossConfig, rank: int = 0, world_size: int = 1, *, gather: str = "all") -> None:
        super().__init__()
        if not isinstance(config, LossConfig):
            raise TypeError(f"config: expected LossConfig, got {type(config).__name__}")
        self.config = config
        self.global_term = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
        self.token_term = TokenContrastiveLoss(rank=rank, world_size=world_size, gather=gather)

    def forward(self, features: MLIPFeatures) -> dict[str, Tensor]:
        """Every term unweighted under its name, and their weighted sum under ``loss``; all are 0-d float32."""
        if not isinstance(features, MLIPFeatures):
            raise TypeError(f"features: expected MLIPFeatures, got {type(features).__name__}")
        config = self.config
        terms = {}
        with torch.autocast(features.pairs["global_spatial"].image.device.type, enabled=False):
            for name, pair in features.pairs.items():
                terms[name] = self.global_term(pair.image, pair.text, pair.scale)
        total = terms["global_spatial"]
        if "global_frequency" in terms:
            total = total + config.frequency_weight * terms["global_frequency"]
        token_terms = {
            name: self.token_term(
                pair.image, pair.text, pair.scale, image_weight=pair.image_weight, text_mask=pair.text_mask
            )
            for name, pair in features.token_pairs.items()
        }
        if token_terms:
            total = total + config.token_weight * torch.stack(list(token_terms.values())).mean()
        if config.consistency_weight > 0 and features.image_frequency is not None:
            image = features.pairs["global_spatial"].image
            terms["consistency"] = (1 - (image * features.image_frequency).sum(-1)).mean()
            total = total + config.consistency_weight * terms["consistency"]
        return {**terms, **token_terms, "loss": total}
