"""What every benchmark shares: a machine described in full, and ratios measured by taking turns.

A time of one run means little elsewhere; a ratio between things that took turns in the same run means more. So every
benchmark stores ratios in ``extra_info``, measured by `ratios`, and claims are made of these only.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from mlip_kernels import _loading, env
from mlip_kernels._library import DISABLED, LOADED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHORTEST_TURN = 0.002  # seconds: much shorter turns measure the clock


def pytest_report_header() -> str:
    return env.summary()


def pytest_sessionstart() -> None:
    """Stop where the reference would be measured in place of the kernels without anyone having asked for it."""
    if said := _loading.hiding():
        raise pytest.UsageError(said)
    if DEVICE.type == "cpu" and LOADED["cpu"] != "ok" and not DISABLED:
        raise pytest.UsageError(_loading.absence("cpu"))


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """Add what decides about speed: torch, GPU, threads, compiled parts."""
    machine_info["mlip_kernels"] = {
        "package": env.outcome(env.package),
        "torch": env.outcome(env.torch_version),
        "torch_cuda": env.outcome(env.torch_cuda),
        "gpu": env.outcome(env.gpu),
        "triton": env.outcome(env.triton_part),
        "parts": _loading.outcomes(),
        "cpu_capability": env.outcome(env.cpu_capability),
        "threads": torch.get_num_threads(),
        "processor": env.outcome(env.processor),
        "platform": platform.platform(),
        "malloc": {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "LD_PRELOAD"))},
    }


def seconds(function: Callable[[], object], calls: int) -> float:
    """Seconds per call of ``calls`` calls, with the device's work done before and after."""
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - start) / calls


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def take_turns(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Shortest seconds per call of each function; the functions take turns, so a disturbance meets all of them."""
    for function in functions.values():
        function()  # compile, warm up
    calls = {name: max(1, round(SHORTEST_TURN / seconds(function, 2))) for name, function in functions.items()}
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            best[name] = min(best[name], seconds(function, calls[name]))
    return best


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)


@pytest.fixture(params=["default", "tuned"])
def allocator(request) -> Iterator[str]:
    """glibc's malloc as it is, or keeping what it has: large results then reuse pages instead of faulting new ones in.

    The latter is what MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 does for a whole process, and close to what
    jemalloc, tcmalloc and GPU allocators do.
    """
    tuned = request.param == "tuned"
    if tuned and platform.libc_ver()[0] != "glibc":
        pytest.skip("needs glibc, whose malloc this tunes")
    if tuned:
        _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})
    yield request.param
    if tuned:
        _mallopt({M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 128 * 1024})


def _mallopt(values: dict[int, int]) -> None:
    library = ctypes.CDLL(None)
    for parameter, value in values.items():
        if library.mallopt(parameter, value) != 1:
            raise OSError(f"mallopt({parameter}, {value}) was refused")


@pytest.fixture
def ratios(benchmark) -> Callable[..., dict[str, float]]:
    """``ratios(ours, {"name": function, ...}, rounds=15)`` benchmarks ``ours`` and compares it with the others.

    ``extra_info["name / ours"]`` is how many times as long ``name`` takes: above 1, ours is faster.
    """

    def measure(
        ours: Callable[[], object], others: dict[str, Callable[[], object]], *, rounds: int = 15
    ) -> dict[str, float]:
        best = take_turns({"ours": ours, **others}, rounds)
        for name in others:
            benchmark.extra_info[f"{name} / ours"] = round(best[name] / best["ours"], 3)
        calls = max(1, round(SHORTEST_TURN / best["ours"]))
        benchmark.pedantic(lambda: (ours(), synchronize()), rounds=5, iterations=calls, warmup_rounds=1)
        return best

    return measure
