"""Contrastive losses with the constructors and calls of open_clip, on one process or on all of a process group."""

from mlip_kernels.nn.losses.clip import ClipLoss
from mlip_kernels.nn.losses.siglip import SigLipLoss
from mlip_kernels.nn.losses.token import TokenContrastiveLoss

__all__ = ["ClipLoss", "SigLipLoss", "TokenContrastiveLoss"]
