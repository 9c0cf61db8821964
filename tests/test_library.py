"""Loading of the compiled parts, the choice among backends, and what importing the package costs."""

import json
import os
import subprocess
import sys

import pytest
import torch

import mlip_kernels
from mlip_kernels import _build_record, _library
from mlip_kernels._library import cuda_kernel, cuda_operator

NAME = "merging_weighted_mean"
CALL_TWICE = """
import warnings
with warnings.catch_warnings(record=True) as at_import:
    warnings.simplefilter("always")
    import torch, mlip_kernels
assert not [w for w in at_import if "mlip_kernels" in str(w.message)], at_import
x = torch.arange(12.0).reshape(1, 3, 4)
with warnings.catch_warnings(record=True) as at_use:
    warnings.simplefilter("always")
    for _ in range(2):
        assert torch.equal(mlip_kernels.weighted_mean(x), x.mean(1))
for warning in at_use:
    print(warning.message)
"""


@pytest.fixture
def no_choice_made():
    """Backends are chosen once per process: forget the choice before and after."""
    cuda_kernel.cache_clear()
    yield
    cuda_kernel.cache_clear()


def test_every_public_name_is_there():
    for name in mlip_kernels.__all__:
        assert callable(getattr(mlip_kernels, name)), name
    with pytest.raises(AttributeError):
        mlip_kernels.no_such_name  # noqa: B018


def test_importing_adds_little_and_none_of_the_heavy_packages(tmp_path):
    code = """
import sys, time
start = time.process_time()
import torch
before, between = set(sys.modules), time.process_time()
import mlip_kernels
print((time.process_time() - between) / (between - start), *set(sys.modules) - before)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)  # the first run compiles the modules, as installing does
    costs = []
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        cost, *modules = done.stdout.split()
        costs.append(float(cost))
    assert min(costs) < 0.03, f"processor time, of that which torch's import takes: {costs}"
    assert {name for name in modules if name.partition(".")[0] != "mlip_kernels"} <= {"torch.ops.mlip_kernels"}


def test_without_the_cpu_part_one_warning_names_the_reason_and_the_remedy(uncompiled):
    (uncompiled.package / "_build.json").write_text(json.dumps({"cpu": "no C++ compiler was found"}))
    done = uncompiled.run("-c", CALL_TWICE)
    assert done.returncode == 0, done.stderr
    (warning,) = done.stdout.splitlines()
    for words in ("no C++ compiler was found", "apt install g++", "pip install", "python -m mlip_kernels.env"):
        assert words in warning


def test_a_package_that_was_never_built_says_so(uncompiled):
    assert "(not built)" in uncompiled.run("-c", CALL_TWICE).stdout


def test_a_part_that_cannot_be_loaded_is_left_out_with_its_reason(uncompiled):
    for part in ("cpu", "cuda"):
        (uncompiled.package / f"_{part}.so").write_text("not a shared library")
    _build_record.write(uncompiled.package, {"cpu": "ok", "cuda": "ok"})
    done = uncompiled.run("-c", CALL_TWICE)
    assert done.returncode == 0, done.stderr
    assert "cannot be loaded" in done.stdout


def test_asking_for_the_reference_disables_every_kernel_without_a_warning(uncompiled):
    code = f"""{CALL_TWICE}
from mlip_kernels._library import LOADED
assert set(LOADED.values()) == {{"disabled by MLIP_KERNELS_DISABLE_EXT=1"}}, LOADED
assert not torch._C._dispatch_has_kernel_for_dispatch_key("mlip_kernels::{NAME}", "CUDA")
"""
    done = uncompiled.run("-c", code, MLIP_KERNELS_DISABLE_EXT="1")
    assert done.returncode == 0, done.stderr
    assert not done.stdout


def test_a_broken_torch_is_reported_at_first_use_not_at_import(uncompiled):
    (uncompiled.folder / "torch.py").write_text("raise OSError('libtorch_cpu.so: cannot open')")
    done = uncompiled.run("-c", "import mlip_kernels; mlip_kernels.dct")
    assert "ImportError: mlip_kernels.dct is not available: libtorch_cpu.so: cannot open" in done.stderr


def test_a_backend_that_is_absent_is_replaced_by_the_other_and_both_by_the_reference(monkeypatch, no_choice_made):
    monkeypatch.delenv("MLIP_KERNELS_CUDA_BACKEND", raising=False)
    monkeypatch.setitem(_library._triton_kernels, NAME, "no_such_triton:forward")
    monkeypatch.setitem(_library.LOADED, "cuda", "ok")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    assert cuda_kernel(NAME, torch.float32, 90) is cuda_operator(NAME)
    assert cuda_operator(NAME).name() == f"mlip_kernels_cuda::{NAME}"
    cuda_kernel.cache_clear()
    monkeypatch.setitem(_library.LOADED, "cuda", "not built")
    assert cuda_kernel(NAME, torch.float32, 90) is None
    monkeypatch.setattr(_library, "_architecture", lambda device: 90)
    assert _library._on_cuda(NAME, lambda *arguments: arguments, torch.ones(1), 2) == (torch.ones(1), 2)


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ("triton", RuntimeError, r"MLIP_KERNELS_CUDA_BACKEND=triton, but .*Triton cannot be imported.*pip install"),
        ("cuda", RuntimeError, r"MLIP_KERNELS_CUDA_BACKEND=cuda, but .*the CUDA part is absent \(not built\)"),
        ("tritn", ValueError, "MLIP_KERNELS_CUDA_BACKEND: expected 'auto', 'triton' or 'cuda', got 'tritn'"),
    ],
)
def test_a_backend_that_was_asked_for_and_is_missing_is_an_error(monkeypatch, no_choice_made, choice, error, message):
    monkeypatch.setenv("MLIP_KERNELS_CUDA_BACKEND", choice)
    monkeypatch.setitem(_library._triton_kernels, NAME, "no_such_triton:forward")
    monkeypatch.setitem(_library.LOADED, "cuda", "not built")
    with pytest.raises(error, match=message):
        cuda_kernel(NAME, torch.float32, 90)


@pytest.mark.skipif(_library.LOADED["cuda"] != "ok", reason="needs the compiled CUDA part: pip install . with nvcc")
def test_the_cuda_part_implements_every_operator_that_triton_does():
    for name in _library._triton_kernels:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(cuda_operator(name).name(), "CUDA"), name


def test_the_cuda_part_is_loaded_when_it_is_first_asked_for():
    code = """
import torch, mlip_kernels
from mlip_kernels._loading import LOADED, outcomes
mlip_kernels.dct(torch.ones(1, 4, 2))
assert set(LOADED) == {"cpu"}, LOADED
assert set(outcomes()) == set(LOADED) == {"cpu", "cuda"}, LOADED
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
