"""Every operator that has GPU kernels. A new one is added here, by one entry in the file of its family."""

from gates.cases import contrastive, merging, spectral
from gates.promises import Operator

OPERATORS: tuple[Operator, ...] = (*contrastive.OPERATORS, *merging.OPERATORS, *spectral.OPERATORS)
