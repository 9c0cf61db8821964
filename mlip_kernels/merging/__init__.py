"""Merging family: fewer image tokens, by merging similar ones, guided by spatial and frequency semantics."""

from mlip_kernels.merging.attention import proportional_attention
from mlip_kernels.merging.plan import MergePlan, merge_plan, merge_tokens
from mlip_kernels.merging.schedule import keep_rate_schedule, merge_layers, merge_schedule, token_counts
from mlip_kernels.merging.weighted_mean import weighted_mean

__all__ = [
    "MergePlan",
    "keep_rate_schedule",
    "merge_layers",
    "merge_plan",
    "merge_schedule",
    "merge_tokens",
    "proportional_attention",
    "token_counts",
    "weighted_mean",
]
