"""Times of functions on a device: medians over repetitions, with caches cold."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

REPETITIONS = 20
FLUSHED_BYTES = 256 << 20
"""Written between repetitions, which is more than the last-level cache of any GPU."""


class Times(NamedTuple):
    """Seconds of one call."""

    device: float
    """Median on the device, launches queued."""
    spread: float
    """Interquartile range of that."""
    host: float
    """Median of the host's own time for the call, while the device is busy."""


def measure(function: Callable[[], object], device: torch.device, repetitions: int = REPETITIONS) -> Times:
    """Time a function that has run before."""
    if device.type != "cuda":
        walls = [_wall(function) for _ in range(repetitions)]
        return Times(statistics.median(walls), _spread(walls), statistics.median(walls))
    flush, starts, ends, hosts = _flush(device), [], [], []
    for _ in range(repetitions):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        began = time.thread_time()
        function()
        hosts.append(time.thread_time() - began)
        end.record()
        starts.append(start)
        ends.append(end)
    torch.cuda.synchronize(device)
    times = [start.elapsed_time(end) / 1e3 for start, end in zip(starts, ends, strict=True)]
    return Times(statistics.median(times), _spread(times), statistics.median(hosts))


def _wall(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _spread(values: list[float]) -> float:
    lower, _, upper = statistics.quantiles(values, n=4)
    return upper - lower


@functools.cache
def _flush(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
