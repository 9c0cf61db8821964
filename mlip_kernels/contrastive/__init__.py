"""Contrastive family: logits between images and texts from all their tokens, and the cross-entropy of pairs."""

from mlip_kernels.contrastive.pair_cross_entropy import pair_cross_entropy
from mlip_kernels.contrastive.token_logits import check_token_logits, token_logits

__all__ = ["check_token_logits", "pair_cross_entropy", "token_logits"]
