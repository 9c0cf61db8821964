"""``python -m mlip_kernels.env`` tells the truth about what works, and works where nothing else does."""

import subprocess
import sys

import pytest
import torch

import mlip_kernels
from mlip_kernels import _loading, env
from mlip_kernels._library import LOADED


def facts(text):
    """Label -> finding."""
    lines = text.splitlines()
    assert lines[0] == lines[-1] == "```"  # a block to paste
    return {line[:16].strip(): line[16:] for line in lines[1:-1] if not line.startswith((" ", "variables"))}


both_parts = set(_loading.outcomes().values()) == {"ok"}


@pytest.mark.skipif(not both_parts, reason="needs both compiled parts: pip install . with nvcc")
def test_a_complete_install_is_reported_ok():
    done = subprocess.run([sys.executable, "-m", "mlip_kernels.env"], capture_output=True, text=True, check=True)
    found = facts(done.stdout)
    assert found["CPU part"] == found["CUDA part"] == "ok"
    assert found["CPU capability"] in _loading.CAPABILITIES
    assert found["torch"].startswith(torch.__version__)
    assert "not known" not in done.stdout


def test_parts_that_were_not_built_are_reported_with_the_reason(uncompiled):
    (uncompiled.package / "_build.json").write_text('{"cpu": "no C++ compiler", "cuda": "no nvcc was found"}')
    found = facts(uncompiled.run("-m", "mlip_kernels.env").stdout)
    assert found["CPU part"] == "no C++ compiler"
    assert found["CUDA part"] == "no nvcc was found"
    assert found["CPU capability"].startswith("none")


def test_a_broken_library_file_is_reported(uncompiled):
    (uncompiled.package / "_cpu.so").write_bytes(b"\x7fELF" + bytes(60))
    found = facts(uncompiled.run("-m", "mlip_kernels.env").stdout)
    assert found["CPU part"].startswith("damaged: ")
    assert found["CUDA part"] == "not built"


def test_a_torch_that_cannot_be_imported_is_reported(uncompiled):
    (uncompiled.folder / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    done = uncompiled.run("-m", "mlip_kernels.env")
    assert done.returncode == 0, done.stderr
    found = facts(done.stdout)
    assert found["torch"] == found["CPU part"] == "not known (OSError: libcudart.so.13: cannot open)"
    assert found["mlip_kernels"].startswith("0.")


def test_a_torch_without_cuda_is_reported(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = facts(env.report())
    assert found["torch CUDA"] == "built without CUDA"
    assert found["GPU"] == "none visible to torch"


def test_variables_that_are_set_are_listed(monkeypatch):
    monkeypatch.setenv("MLIP_KERNELS_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    lines = env.report().splitlines()
    assert "  MLIP_KERNELS_CPU_CAPABILITY=avx2" in lines
    assert "  TORCH_CUDA_ARCH_LIST=9.0" in lines


def test_variables_that_are_not_understood_are_pointed_out(uncompiled):
    found = uncompiled.run("-m", "mlip_kernels.env", MLIP_KERNELS_DISABLE_EXT="true", MLIP_KERNELS_CUDA_BACKENDS="cuda")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert "  MLIP_KERNELS_DISABLE_EXT=true  <- MLIP_KERNELS_DISABLE_EXT: expected '1' or '0', got 'true'" in lines
    assert any(line.endswith("did you mean MLIP_KERNELS_CUDA_BACKEND?") for line in lines)
    assert facts(found.stdout)["CPU part"].startswith("not known (ValueError: MLIP_KERNELS_DISABLE_EXT: expected")


def test_a_capability_that_the_processor_lacks_is_reported(monkeypatch):
    monkeypatch.setattr(env, "compiled_part", lambda part: "ok")
    monkeypatch.setattr(_loading, "cpu_capability", lambda: _loading.CPUCapability("avx512", "avx2"))
    assert env.cpu_capability() == "avx2 (MLIP_KERNELS_CPU_CAPABILITY=avx512 was asked for)"


def test_one_line_sums_up_which_package_this_is():
    said = env.summary()
    assert "\n" not in said
    for words in (mlip_kernels.__version__, str(_loading.PACKAGE), f"CPU part: {LOADED['cpu']}", "CUDA part: "):
        assert words in said


def test_every_probe_may_fail_on_its_own(monkeypatch):
    def fails():
        raise SystemExit("driver and library do not match")

    monkeypatch.setattr(env, "PROBES", tuple((label, fails) for label, _ in env.PROBES))
    assert set(facts(env.report()).values()) == {"not known (SystemExit: driver and library do not match)"}
