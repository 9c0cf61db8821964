"""Deprecated: the definitions in plain PyTorch are modules of their families, as ``merging.plain``."""

import sys
import warnings

from mlip_kernels.contrastive import plain as contrastive
from mlip_kernels.merging import plain as merging
from mlip_kernels.spectral import plain as spectral

__all__ = ["contrastive", "merging", "spectral"]

warnings.warn(
    "mlip_kernels.reference is deprecated: call public functions inside `with mlip_kernels.use_reference():`, or import"
    " the plain definitions from mlip_kernels.spectral, .merging or .contrastive",
    DeprecationWarning,
    stacklevel=2,
)
sys.modules.update({f"{__name__}.{name}": globals()[name] for name in __all__})
