"""Time spent training, on a device that works behind the program."""

from __future__ import annotations

import math
import time

import torch


class Stopwatch:
    """Seconds between `start` and `stop`, added up.

    A GPU computes behind the program: it is waited for at both ends of a span, and never within one, so that the
    steps of a span overlap as they do without a clock.

    Args:
        device: that is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self._began = math.nan

    def start(self) -> None:
        """Begin a span."""
        self._wait()
        self._began = time.perf_counter()

    def stop(self) -> None:
        """End the span."""
        self._wait()
        self.seconds += time.perf_counter() - self._began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
