"""Deprecated: the families are ``mlip_kernels.spectral``, ``.merging`` and ``.contrastive`` now."""

import sys
import warnings

from mlip_kernels import _arguments as arguments
from mlip_kernels import contrastive, merging, spectral

__all__ = ["arguments", "contrastive", "merging", "spectral"]

warnings.warn(
    "mlip_kernels.ops is deprecated: import mlip_kernels.spectral, .merging or .contrastive instead",
    DeprecationWarning,
    stacklevel=2,
)
sys.modules.update({f"{__name__}.{name}": globals()[name] for name in __all__})
