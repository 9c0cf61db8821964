"""Environment variables: what is not understood is an error or a warning, on every machine."""

import os
import subprocess
import sys
import warnings

import pytest

from mlip_kernels import _loading, _variables

CASES = [
    *((name, value) for name in ("MLIP_KERNELS_DISABLE_EXT",) for value in ("true", "yes", "True", "1 ", "on", "2")),
    *(("MLIP_KERNELS_CPU_CAPABILITY", value) for value in ("AVX2", "avx2 ", "avx-512", "avx", "sse")),
    *(("MLIP_KERNELS_CUDA_BACKEND", value) for value in ("Triton", "CUDA", "tritn", "cuda ", "none")),
    *((name, value) for name in _variables.AT_BUILD_TIME for value in ("true", "YES", " 1")),
]


@pytest.fixture(autouse=True)
def none_set(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MLIP_KERNELS_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_value_that_is_not_understood_is_an_error_that_names_it_and_what_is(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    table = _variables.AT_RUN_TIME if name in _variables.AT_RUN_TIME else _variables.AT_BUILD_TIME
    with pytest.raises(ValueError, match=f"{name}: expected .* or .*, got {value!r}"):
        _variables.check(table)


@pytest.mark.parametrize("name", _variables.AT_RUN_TIME)
def test_every_value_of_the_table_is_understood_and_empty_is_unset(monkeypatch, name):
    for value in (*_variables.AT_RUN_TIME[name], ""):
        monkeypatch.setenv(name, value)
        _variables.check(_variables.AT_RUN_TIME)
        assert _variables.read(name) == value
    monkeypatch.delenv(name)
    assert _variables.read(name) == ""


def test_flags_mean_what_they_say(monkeypatch):
    for value, expected in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("MLIP_KERNELS_DISABLE_EXT", value)
        assert _variables.flag("MLIP_KERNELS_DISABLE_EXT") is expected


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("MLIP_KERNELS_DISABLE_EXTENSIONS", "did you mean MLIP_KERNELS_DISABLE_EXT?"),
        ("MLIP_KERNELS_CPU_CAPABILTY", "did you mean MLIP_KERNELS_CPU_CAPABILITY?"),
        ("mlip_kernels_skip_ext", "did you mean MLIP_KERNELS_SKIP_EXT?"),
        ("MLIP_KERNELS_Q", "there are MLIP_KERNELS_CPU_CAPABILITY, MLIP_KERNELS_CUDA_BACKEND"),
    ],
)
def test_an_unknown_name_is_answered_with_the_right_one(monkeypatch, name, said):
    monkeypatch.setenv(name, "1")
    ((found, sentence),) = _variables.unknown().items()
    assert found == name
    assert sentence.startswith(f"{name} is not a variable of this package; {said}")


def test_using_the_package_under_such_a_variable_fails_also_without_a_gpu(uncompiled):
    done = uncompiled.run("-c", "from mlip_kernels import dct", MLIP_KERNELS_CUDA_BACKEND="Triton")
    assert "MLIP_KERNELS_CUDA_BACKEND: expected 'auto', 'triton' or 'cuda', got 'Triton'" in done.stderr
    assert done.returncode == 1


def test_loading_warns_of_unknown_names_and_of_a_capability_that_is_not_there(monkeypatch):
    monkeypatch.setenv("MLIP_KERNELS_DISABLE_EX", "1")
    monkeypatch.setenv("MLIP_KERNELS_CPU_CAPABILITY", "avx512")
    monkeypatch.setattr(_loading, "_load_part", lambda part: "ok")
    monkeypatch.setattr(_loading, "LOADED", {})
    monkeypatch.setattr(_loading, "cpu_capability", lambda: _loading.CPUCapability("avx512", "avx2"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _loading.load()
    unknown, lowered = (str(warning.message) for warning in seen)
    assert "MLIP_KERNELS_DISABLE_EX is not a variable" in unknown
    assert "MLIP_KERNELS_CPU_CAPABILITY=avx512" in lowered
    assert "no more than avx2" in lowered


ASK_FIRST = """
from mlip_kernels._loading import cpu_capability
import mlip_kernels
print(*cpu_capability())
"""


@pytest.mark.skipif(_loading.LOADED["cpu"] != "ok", reason="needs the compiled CPU part: pip install .")
@pytest.mark.parametrize("name", ["baseline", "default"])
def test_the_lowest_capability_has_two_names(name):
    variables = {**os.environ, "MLIP_KERNELS_CPU_CAPABILITY": name}
    done = subprocess.run([sys.executable, "-c", ASK_FIRST], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["baseline", "baseline"]
    assert "MLIP_KERNELS" not in done.stderr
