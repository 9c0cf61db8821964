"""Contrastive family in plain PyTorch: the definition of right, on any device and in any dtype."""

from mlip_kernels.reference.contrastive.logits import (
    Maxima,
    compute_dtype,
    index_dtype,
    shares,
    token_logits,
    token_maxima,
    token_maxima_backward,
)

__all__ = [
    "Maxima",
    "compute_dtype",
    "index_dtype",
    "shares",
    "token_logits",
    "token_maxima",
    "token_maxima_backward",
]
