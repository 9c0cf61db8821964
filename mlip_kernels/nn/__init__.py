"""Modules built on the operators: losses, spectral filters, pooling."""

from mlip_kernels.nn.cached import CachedContrastive
from mlip_kernels.nn.losses import ClipLoss, SigLipLoss, TokenContrastiveLoss
from mlip_kernels.nn.pooling import AttentionPool
from mlip_kernels.nn.spectral import FrequencyStage, SpectralFilter

__all__ = [
    "AttentionPool",
    "CachedContrastive",
    "ClipLoss",
    "FrequencyStage",
    "SigLipLoss",
    "SpectralFilter",
    "TokenContrastiveLoss",
]
