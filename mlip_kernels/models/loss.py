"""The contrastive terms of MLIP: {global, token} × {spatial, frequency}.

``L = L_g^S + λ_F·L_g^F + λ_t·(L_t^S + L_t^F)/2`` with InfoNCE per term, each with its own learned temperature.
Global terms compare one feature an image with one a caption (CLIP); token terms compare by the mean of maximal
similarities (FILIP, arXiv 2111.07783).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlip_kernels.models.config import LossConfig
from mlip_kernels.models.mlip import MLIPFeatures
from mlip_kernels.nn.losses import ClipLoss, TokenContrastiveLoss


class MLIPLoss(nn.Module):
    """Weighted sum of the contrastive terms over `MLIPFeatures`.

    In a process group every rank computes the terms of its own images and captions against those of all ranks; the
    mean of the ranks' losses is the loss of the whole batch, so gradients averaged by DDP are those of one process.

    Args:
        config: weights and choices.
        rank: of this process.
        world_size: processes that share the batch.
    """

    def __init__(self, config: LossConfig, rank: int = 0, world_size: int = 1) -> None:
        super().__init__()
        self.config = config
        gathered = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": world_size}
        self.global_term = ClipLoss(**gathered)
        self.token_term = TokenContrastiveLoss(rank=rank, world_size=world_size)

    def forward(self, features: MLIPFeatures) -> dict[str, Tensor]:
        """Every term unweighted under its name, and their weighted sum under ``loss``; all are 0-d float32."""
        config = self.config
        with torch.autocast(features.image.device.type, enabled=False):
            terms = {"global_spatial": self.global_term(features.image, features.text, features.logit_scale)}
            if config.frequency_weight > 0:
                terms["global_frequency"] = self.global_term(
                    features.image_frequency, features.text_frequency, features.logit_scale_frequency
                )
        total = terms["global_spatial"]
        if config.frequency_weight > 0:
            total = total + config.frequency_weight * terms["global_frequency"]
        token_terms = self._token_terms(features)
        if token_terms:
            total = total + config.token_weight * torch.stack(list(token_terms.values())).mean()
        if config.consistency_weight > 0:
            terms["consistency"] = (1 - (features.image * features.image_frequency).sum(-1)).mean()
            total = total + config.consistency_weight * terms["consistency"]
        return {**terms, **token_terms, "loss": total}

    def _token_terms(self, features: MLIPFeatures) -> dict[str, Tensor]:
        config, terms = self.config, {}
        if config.token_weight == 0:
            return terms
        spatial, frequency = features.image_tokens, features.image_frequency_tokens
        if config.token_domains == "union":
            weights = [tokens.weight for tokens in (spatial, frequency)]
            if all(weight is None for weight in weights):
                weight = None
            else:
                parts = zip((spatial, frequency), weights, strict=True)
                weight = torch.cat([w if w is not None else p.tokens.new_ones(p.tokens.shape[:2]) for p, w in parts], 1)
            terms["token_union"] = self.token_term(
                torch.cat([spatial.tokens, frequency.tokens], dim=1),
                features.text_tokens,
                features.logit_scale_tokens,
                image_weight=weight,
                text_mask=features.text_mask,
            )
            return terms
        if config.spatial_tokens:
            terms["token_spatial"] = self.token_term(
                spatial.tokens,
                features.text_tokens,
                features.logit_scale_tokens,
                image_weight=spatial.weight,
                text_mask=features.text_mask,
            )
        if config.frequency_tokens:
            terms["token_frequency"] = self.token_term(
                frequency.tokens,
                features.text_frequency_tokens,
                features.logit_scale_frequency_tokens,
                image_weight=frequency.weight,
                text_mask=features.text_mask,
            )
        return terms
