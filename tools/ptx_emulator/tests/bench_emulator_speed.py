"""Lane-instructions per second of the emulator, with every check on, and what the checks cost.

    pytest tests/bench_emulator_speed.py --benchmark-only

A lane-instruction is one instruction executed by one thread. The emulator runs on one core; nothing here says how fast
a kernel is on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import known_kernels_runs as known
import pytest
import torch
from ptx_emulator import Emulator, Launch
from speed_kernels import ARITHMETIC, MIXED, seconds

pytestmark = [
    pytest.mark.skipif("not config.getoption('benchmark_only')", reason="needs --benchmark-only"),
    pytest.mark.benchmark(group="PTX emulator"),
]
ROUNDS = 5


def arithmetic() -> Callable[[Emulator], Launch]:
    out = torch.zeros(256)
    return lambda emulator: emulator.launch(ARITHMETIC, "kernel", 1, 256, [out])


def mixed() -> Callable[[Emulator], Launch]:
    out = torch.zeros(256)
    return lambda emulator: emulator.launch(MIXED, "kernel", 1, 256, [out])


def cuda_matmul() -> Callable[[Emulator], Launch]:
    size = 128
    ptx = known.ptx("known_kernels/kernels.cu", 80)
    a, b, c = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    return lambda emulator: emulator.launch(ptx, "matmul", (8, 8), (16, 16), [a, b, c, size, size, size])


def cuda_softmax() -> Callable[[Emulator], Launch]:
    ptx = known.ptx("known_kernels/kernels.cu", 80)
    x = torch.randn(128, 197).bfloat16()
    y = torch.empty_like(x)
    return lambda emulator: emulator.launch(ptx, "softmax", 128, 128, [x, y, 197])


def triton_matmul(arch: int) -> Callable[[Emulator], Launch]:
    pytest.importorskip("triton", reason="needs Triton")
    import triton_kernels as kernels

    size = 256
    a, b, c = torch.randn(size, size).bfloat16(), torch.randn(size, size).bfloat16(), torch.empty(size, size)
    arguments = [a, b, c, size, size, size, size, 1, size, 1, size, 1]
    compiled, left = kernels.compile_for(kernels.matmul, arguments, arch, bm=64, bn=64, bk=32)
    return lambda emulator: kernels.run_on(emulator, compiled, left, (4, 4))


CASES = {
    "arithmetic": arithmetic,
    "arithmetic and shared memory": mixed,
    "CUDA matmul without tensor cores": cuda_matmul,
    "CUDA softmax": cuda_softmax,
    "Triton matmul, mma.sync": lambda: triton_matmul(80),
    "Triton matmul, wgmma": lambda: triton_matmul(90),
}


@pytest.mark.parametrize("name", CASES)
def test_lane_instructions_per_second(benchmark, name: str):
    run, checking = CASES[name](), Emulator(90)
    trusting = Emulator(90, races=False, uninitialised=False, statistics=False)
    best = seconds({"checks": lambda: run(checking), "no checks": lambda: run(trusting)}, rounds=ROUNDS)
    launch = benchmark.pedantic(run, args=(checking,), rounds=ROUNDS, warmup_rounds=1)
    shortest = min(best["checks"], benchmark.stats.stats.min)
    statistics = launch.statistics
    benchmark.extra_info["lane-instructions per second"] = f"{statistics.lane_instructions / shortest / 1e6:.0f} M"
    benchmark.extra_info["checks / no checks"] = round(best["checks"] / best["no checks"], 2)
    if statistics.matrix_macs:
        benchmark.extra_info["tensor-core multiply-adds per second"] = (
            f"{statistics.matrix_macs / shortest / 1e6:.0f} M"
        )
