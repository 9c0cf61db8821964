"""What ``auto`` runs on CUDA tensors is what the table of choices says, and the table is one that can be obeyed."""

import datetime
import json
import subprocess
import sys

import pytest
import torch

from mlip_kernels import _cuda_choices, _library, env
from mlip_kernels._cuda_choices import BASES, CHOICES, DTYPES, INHERITS

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
TABLE = {
    "sm_80": {
        "a": {"float32": "triton", "float16": "cuda", "bfloat16": "cuda", "basis": "modelled", "date": "2026-01-02"}
    },
    "sm_90": {
        "inherits": "sm_80",
        "b": {"float32": "plain", "float16": "triton", "bfloat16": "triton", "basis": "measured", "date": "2026-03-04"},
    },
    "sm_120": {"inherits": "sm_80"},
}


@pytest.fixture
def auto(monkeypatch):
    """Nothing asks for a backend, and nothing was chosen before; both backends are there as functions."""
    monkeypatch.delenv("MLIP_KERNELS_CUDA_BACKEND", raising=False)
    for backend in ("triton", "cuda"):
        monkeypatch.setattr(_library, f"_find_{backend}", lambda name, backend=backend: (f"{backend} {name}", ""))
    _library.cuda_kernel.cache_clear()
    yield monkeypatch
    _library.cuda_kernel.cache_clear()


def take(monkeypatch, table):
    monkeypatch.setattr(_cuda_choices, "load", lambda: table)


def test_every_operator_with_gpu_kernels_has_a_choice_and_no_other_name_has():
    named = {operator for rows in _cuda_choices.load().values() for operator in rows} - {INHERITS}
    assert named == set(_library._triton_kernels)


@pytest.mark.parametrize("arch", [70, 75, 80, 86, 89, 90, 100, 103, 120, 121, 150])
@pytest.mark.parametrize("operator", sorted(_library._triton_kernels))
def test_a_choice_is_known_on_every_architecture(operator, arch):
    row = _cuda_choices.row(operator, arch)
    assert set(row) == {*DTYPES, "basis", "date"}
    assert {row[dtype] for dtype in DTYPES} <= set(CHOICES)
    assert row["basis"] in BASES
    datetime.date.fromisoformat(row["date"])


def test_the_file_is_as_the_tools_write_it():
    table = _cuda_choices.load()
    assert set(table) >= set(ARCHITECTURES)
    assert _cuda_choices.PATH.read_text(encoding="utf-8") == _cuda_choices.text(table)
    assert json.loads(_cuda_choices.text(TABLE)) == TABLE


@pytest.mark.parametrize(
    ("operator", "arch", "expected"),
    [
        ("a", 80, "triton"),
        ("a", 75, "triton"),  # the lowest that is named
        ("a", 89, "triton"),
        ("a", 90, "triton"),  # inherited
        ("b", 90, "plain"),
        ("b", 103, "plain"),  # as the nearest below
        ("b", 80, None),
        ("b", 121, None),
        ("c", 90, None),
    ],
)
def test_an_architecture_without_a_row_inherits_one(operator, arch, expected):
    assert _cuda_choices.choice(operator, "float32", arch, TABLE) == expected


@pytest.mark.parametrize("operator", sorted(_library._triton_kernels))
@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_obeys_the_table(auto, operator, dtype):
    for arch in (80, 90, 120):
        chosen = _cuda_choices.choice(operator, dtype, arch)
        expected = _library._references[operator] if chosen == "plain" else f"{chosen} {operator}"
        assert _library.cuda_kernel(operator, getattr(torch, dtype), arch) == expected


def test_dtypes_and_architectures_have_choices_of_their_own(auto):
    take(auto, TABLE)
    auto.setitem(_library._references, "b", "plain b")
    found = [_library.cuda_kernel("a", dtype, 80) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert found == ["triton a", "cuda a", "cuda a"]
    assert _library.cuda_kernel("b", torch.float32, 90) == "plain b"
    assert _library.cuda_kernel("b", torch.bfloat16, 90) == "triton b"


def test_what_is_absent_is_replaced_by_the_other_backend(auto):
    take(auto, TABLE)
    auto.setattr(_library, "_find_triton", lambda name: (None, "it is not there"))
    assert _library.cuda_kernel("a", torch.float32, 80) == "cuda a"
    auto.setattr(_library, "_find_cuda", lambda name: (None, "it is not there"))
    _library.cuda_kernel.cache_clear()
    assert _library.cuda_kernel("a", torch.float32, 80) is None


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_variable_overrides_the_table(auto, backend):
    auto.setenv("MLIP_KERNELS_CUDA_BACKEND", backend)
    take(auto, TABLE)
    for dtype in (torch.float32, torch.bfloat16):
        assert _library.cuda_kernel("a", dtype, 80) == f"{backend} a"
        assert _library.cuda_kernel("b", dtype, 90) == f"{backend} b"


def test_the_dtype_is_that_of_the_tokens():
    weights, tokens = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    assert _library._dtype_of_tokens((weights, None, 3, tokens)) == torch.bfloat16
    assert _library._dtype_of_tokens((weights, torch.ones(2, dtype=torch.int64))) == torch.float32


def test_env_shows_the_choices_and_what_they_are_based_on(monkeypatch):
    monkeypatch.delenv("MLIP_KERNELS_CUDA_BACKEND", raising=False)
    monkeypatch.setattr(_cuda_choices, "load", lambda: TABLE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    said = env.cuda_backend()
    assert said == "auto, sm_90: 1 on plain/triton, 1 on triton/cuda (measured 2026-03-04 and modelled 2026-01-02)"
    monkeypatch.setenv("MLIP_KERNELS_CUDA_BACKEND", "cuda")
    assert env.cuda_backend() == "cuda"


def test_the_table_is_read_without_torch():
    code = (
        f"import sys; sys.path.insert(0, {str(_cuda_choices.PATH.parent)!r}); import _cuda_choices;"
        "print(_cuda_choices.summary(90), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("sm_90: ")
    assert done.stdout.endswith("False\n")
