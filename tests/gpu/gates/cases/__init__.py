"""Every operator that has GPU kernels. A new one is added here, by one entry in the file of its family."""

from gates.cases import contrastive, merging, merging_tokens, spectral
from gates.promises import Operator

OPERATORS: tuple[Operator, ...] = (
    *merging.OPERATORS,
    *merging_tokens.OPERATORS,
    *spectral.OPERATORS,
    *contrastive.OPERATORS,
)
