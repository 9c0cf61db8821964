"""What the tests of GPU kernels run on: emulated GPUs, and with ``pytest -m gpu`` a real one.

All that compile a kernel or the emulator are left to `make test-gpu`.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from ptx_emulator.build import BuildError, build_emulator

from mlip_kernels import _library

HERE = Path(__file__).resolve().parent
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


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents and not item.get_closest_marker("compiles_nothing"):
            item.add_marker(pytest.mark.gpu_kernels)
            item.add_marker(pytest.mark.xdist_group(_group(item)))


def _group(item):
    """Tests that share what is slow to make, or that must be in one process, go to one worker of pytest-xdist."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if item.path.name == "test_gpu_gates.py" and "arch" in parameters:
        return f"gates {parameters.get('backend', 'cuda')} {parameters['arch']}"
    return item.path.stem


@pytest.fixture(params=[*EMULATED, *REAL])
def cuda(request):
    """A GPU to run operators on: ``with cuda: y = operator(cuda.put(x))``, then ``cuda.operators`` says what ran."""
    return _device(*request.param)


@pytest.fixture(params=EMULATED)
def emulated_cuda(request):
    """As `cuda`, without a real one: ``emulated_cuda.launches`` says which kernels ran, and what they did."""
    return _device(*request.param)


@pytest.fixture(params=[*SCHEDULED, *REAL])
def scheduled_cuda(request):
    """As `cuda`, with the warps in another order; ``scheduled_cuda.under("round_robin")`` is the usual one."""
    return _device(*request.param)


@pytest.fixture(scope="session")
def needs_emulated():
    """``needs_emulated(backend)`` skips where that backend cannot be emulated, and says what is missing."""
    return _skip_without


def _device(backend, arch=None, schedule="round_robin", seed=0):
    if arch is None:
        return _real_device(backend)
    _skip_without(backend)
    from emulated_cuda import EmulatedCuda

    # As small as a GPU can be, so that blocks go through several batch elements.
    return EmulatedCuda(backend, arch, schedule=schedule, seed=seed, multiprocessors=1)


def _skip_without(backend):
    if lacking := _lacking(backend):
        pytest.skip(lacking)


@functools.cache
def _lacking(backend):
    """What the emulation of a backend needs and does not find."""
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "needs Triton: pip install triton"
    try:
        build_emulator()
    except BuildError as failure:
        if str(failure).startswith("needs"):
            return str(failure)
        raise
    from emulated_cuda import cuda_library

    return cuda_library.missing() if backend == "cuda" else None


def _real_device(backend):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that torch can use")
    kernel, reason = (_library._find_triton if backend == "triton" else _library._find_cuda)("merging_weighted_mean")
    if kernel is None:
        pytest.skip(f"needs the {backend} backend: {reason}")
    from emulated_cuda.real import RealCuda

    return RealCuda(backend)
