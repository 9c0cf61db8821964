"""MLIP-style models: thin classes on timm's image and open_clip's text transformers (needs the ``train`` extra)."""

from mlip_kernels._extras import needing

with needing("train", "mlip_kernels.models"):
    from mlip_kernels.models.config import (
        FrequencyConfig,
        ImageConfig,
        LossConfig,
        MergingConfig,
        MLIPConfig,
        TextConfig,
    )
    from mlip_kernels.models.features import MLIPFeatures
    from mlip_kernels.models.loss import MLIPLoss
    from mlip_kernels.models.mlip import MLIP
    from mlip_kernels.models.open_clip_exchange import from_open_clip, to_open_clip
    from mlip_kernels.models.preprocessing import Preprocessing

__all__ = [
    "MLIP",
    "FrequencyConfig",
    "ImageConfig",
    "LossConfig",
    "MLIPConfig",
    "MLIPFeatures",
    "MLIPLoss",
    "MergingConfig",
    "Preprocessing",
    "TextConfig",
    "from_open_clip",
    "to_open_clip",
]
