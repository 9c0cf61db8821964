"""What the tests of GPU kernels run on: emulated GPUs, and with ``pytest -m gpu`` a real one."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch
from ptx_emulator.build import BuildError, build_emulator

from mlip_kernels import _library

BACKENDS = ("triton", "cuda")
ARCHITECTURES = (80, 90)
SCHEDULES = (("reversed", 0), ("random", 1), ("random", 2))
REAL = [pytest.param((backend,), id=f"{backend}-gpu", marks=pytest.mark.gpu) for backend in BACKENDS]
EMULATED = [pytest.param((backend, arch), id=f"{backend}-sm{arch}") for backend in BACKENDS for arch in ARCHITECTURES]
SCHEDULED = [
    pytest.param((backend, arch, *schedule), id=f"{backend}-sm{arch}-{schedule[0]}{schedule[1] or ''}")
    for backend in BACKENDS
    for arch in ARCHITECTURES
    for schedule in SCHEDULES
]


@pytest.fixture(params=[*EMULATED, *REAL])
def cuda(request):
    """A GPU to run operators on: ``with cuda: y = operator(cuda.put(x))``, then ``cuda.launches``."""
    return _device(*request.param)


@pytest.fixture(params=[*SCHEDULED, *REAL])
def scheduled_cuda(request):
    """As `cuda`, with the warps in another order; ``scheduled_cuda.under("round_robin")`` is the usual one."""
    return _device(*request.param)


def _device(backend, arch=None, schedule="round_robin", seed=0):
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: pip install triton")
    if arch is None:
        return _real_device(backend)
    from emulated_cuda import EmulatedCuda, cuda_library

    if reason := _lacks():
        pytest.skip(reason)
    if backend == "cuda" and cuda_library.missing():
        pytest.skip(cuda_library.missing())
    return EmulatedCuda(backend, arch, schedule=schedule, seed=seed)


@functools.cache
def _lacks():
    """What the emulator needs and does not find."""
    try:
        build_emulator()
    except BuildError as failure:
        if str(failure).startswith("needs"):
            return str(failure)
        raise
    return ""


def _real_device(backend):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that torch can use")
    if backend == "cuda" and _library.LOADED["cuda"] != "ok":
        pytest.skip(f"needs the CUDA part of the package: {_library.LOADED['cuda']}")
    from emulated_cuda.real import RealCuda

    return RealCuda(backend)
