"""The emulator stays fast enough to be used, measured against this machine's own Python: load then matters little."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_emulator import Emulator
from speed_kernels import ARITHMETIC, MIXED, seconds

ITERATIONS = 200_000


def count() -> int:
    total = 0
    for _ in range(ITERATIONS):
        total += 1
    return total


@pytest.mark.parametrize("kernel", [ARITHMETIC, MIXED], ids=["arithmetic", "shared memory and barriers"])
def test_a_lane_instruction_takes_less_than_one_iteration_of_a_python_loop(kernel: str):
    """With all checks. The aim is a hundred million lane-instructions a second; this is a floor far below it."""
    out = np.zeros(256, np.float32)
    emulator = Emulator(90)
    executed = emulator.launch(kernel, "kernel", 1, 256, [out]).statistics.lane_instructions
    best = seconds({"emulator": lambda: emulator.launch(kernel, "kernel", 1, 256, [out]), "python": count}, rounds=5)
    assert best["emulator"] / executed < best["python"] / ITERATIONS
