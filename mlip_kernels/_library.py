"""Operator schemas, and the compiled parts that implement them where they could be built.

Schemas and the plain-PyTorch reference are registered from Python, so the package imports, traces and trains even
where nothing was compiled. A compiled part adds faster kernels for its device under the same names; which one runs
is torch's own dispatch by device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

LIBRARY = torch.library.Library("mlip_kernels", "DEF")

LOADED: dict[str, str] = {}
"""Compiled part -> ``"ok"`` or the reason why it is absent."""

_reference_depth = 0


@contextmanager
def use_reference() -> Iterator[None]:
    """Run every operator called inside on the plain-PyTorch reference, whatever is compiled."""
    global _reference_depth
    _reference_depth += 1
    try:
        yield
    finally:
        _reference_depth -= 1


def reference_requested() -> bool:
    """Whether `use_reference` is active."""
    return _reference_depth > 0


def load() -> None:
    """Load the compiled parts that lie beside this file, and note why the others are absent."""
    for part in ("cpu", "cuda"):
        path = Path(__file__).with_name(f"_{part}.so")
        if os.environ.get("MLIP_KERNELS_DISABLE_EXT") == "1":
            LOADED[part] = "disabled by MLIP_KERNELS_DISABLE_EXT=1"
        elif not path.exists():
            LOADED[part] = "not built"
        else:
            try:
                torch.ops.load_library(path)
                LOADED[part] = "ok"
            except OSError as failure:
                LOADED[part] = str(failure)
