"""Packages of the ``[train]`` extra, imported only where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str) -> Any:
    """Import ``module``; where it is absent, the error names the remedy."""
    try:
        return importlib.import_module(module)
    except ImportError as failure:
        raise ImportError(
            f"the training data need {module!r} ({failure}): pip install 'mlip_kernels[train]'"
        ) from failure
