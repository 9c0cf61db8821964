"""Merging family in plain PyTorch: the definition of right, on any device and in any dtype."""

from mlip_kernels.reference.merging.attention import proportional_attention
from mlip_kernels.reference.merging.plan import Matching, combine, composed, match, merge, merged_sizes, spread, unmerge
from mlip_kernels.reference.merging.weighted_mean import accumulation_dtype, weighted_mean

__all__ = [
    "Matching",
    "accumulation_dtype",
    "combine",
    "composed",
    "match",
    "merge",
    "merged_sizes",
    "proportional_attention",
    "spread",
    "unmerge",
    "weighted_mean",
]
