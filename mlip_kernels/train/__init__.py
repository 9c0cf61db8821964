"""The trainer: ``mlip-train`` on the command line, `train` from Python (needs the ``train`` extra)."""

from mlip_kernels.train.config import PRESETS, TrainConfig
from mlip_kernels.train.loop import Outcome, train

__all__ = ["PRESETS", "Outcome", "TrainConfig", "train"]
