"""The trainer: ``mlip-train`` on the command line, `train` from Python (needs the ``train`` extra).

Its parts are imported when they are used, so that the command can say what is missing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from mlip_kernels._extras import needing

if TYPE_CHECKING:
    from mlip_kernels.train.config import PRESETS, TrainConfig
    from mlip_kernels.train.loop import Outcome, train

__all__ = ["PRESETS", "Outcome", "TrainConfig", "train"]

_MODULES = {"PRESETS": "config", "TrainConfig": "config", "Outcome": "loop", "train": "loop"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needing("train", __name__):
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
