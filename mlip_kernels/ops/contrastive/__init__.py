"""Contrastive family: logits between images and texts from all their tokens, in both directions at once."""

from mlip_kernels.ops.contrastive.logits import check_token_logits, token_logits

__all__ = ["check_token_logits", "token_logits"]
