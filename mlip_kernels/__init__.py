"""Fused kernels for training CLIP-like models faster: spectral features, token merging, token-level contrast."""

__version__ = "0.1.0"
__all__ = [
    "MergePlan",
    "amplitude_phase",
    "band_energy",
    "dct",
    "idct",
    "irfft",
    "keep_rate_schedule",
    "merge_layers",
    "merge_plan",
    "merge_schedule",
    "merge_tokens",
    "pair_cross_entropy",
    "proportional_attention",
    "rfft",
    "spectral_filter",
    "spectral_resize",
    "token_counts",
    "token_energy",
    "token_logits",
    "use_reference",
    "weighted_mean",
]

try:
    from mlip_kernels._library import use_reference
    from mlip_kernels.ops.contrastive import pair_cross_entropy, token_logits
    from mlip_kernels.ops.merging import (
        MergePlan,
        keep_rate_schedule,
        merge_layers,
        merge_plan,
        merge_schedule,
        merge_tokens,
        proportional_attention,
        token_counts,
        weighted_mean,
    )
    from mlip_kernels.ops.spectral import (
        amplitude_phase,
        band_energy,
        dct,
        idct,
        irfft,
        rfft,
        spectral_filter,
        spectral_resize,
        token_energy,
    )
except Exception as _failure:  # a broken torch must not keep `python -m mlip_kernels.env` from saying so
    _reason = _failure

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(f"mlip_kernels.{name} is not available: {_reason}") from _reason
        raise AttributeError(f"module 'mlip_kernels' has no attribute {name!r}")
