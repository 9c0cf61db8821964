"""Fused kernels for training CLIP-like models faster: spectral features, token merging, token-level contrast."""

__version__ = "0.1.0"
__all__ = ["use_reference", "weighted_mean"]

try:
    from mlip_kernels._library import use_reference
    from mlip_kernels.ops.merging.weighted_mean import weighted_mean
except Exception as _failure:  # a broken torch must not keep `python -m mlip_kernels.env` from saying so
    _reason = _failure

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(f"mlip_kernels.{name} is not available: {_reason}") from _reason
        raise AttributeError(f"module 'mlip_kernels' has no attribute {name!r}")
