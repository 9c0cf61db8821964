"""Throughput counts what a device did, not what it was asked to do."""

import pytest
import torch

from mlip_kernels.train.timing import Stopwatch


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_device_is_waited_for_at_both_ends_of_a_span_only(monkeypatch, kind):
    """A device that is busy until it is waited for: its work counts in the span that asked for it, in no other."""
    now, pending = 0.0, 5.0

    def synchronize(device):
        nonlocal now, pending
        assert device.type == kind == "cuda"
        now, pending = now + pending, 0.0

    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    monkeypatch.setattr("mlip_kernels.train.timing.time.perf_counter", lambda: now)
    watch = Stopwatch(torch.device(kind))
    watch.start()  # behind 5 seconds of work of before
    now, pending = now + 1.0, 2.0 if kind == "cuda" else 0.0
    watch.stop()
    assert watch.seconds == (3.0 if kind == "cuda" else 1.0)
    now += 10.0
    watch.start()
    now += 1.0
    watch.stop()
    assert watch.seconds == (4.0 if kind == "cuda" else 2.0)
