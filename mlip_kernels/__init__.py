"""Fused kernels for training CLIP-like models faster: spectral features, token merging, token-level contrast."""

from mlip_kernels._library import use_reference

__version__ = "0.1.0"
__all__ = ["use_reference"]
