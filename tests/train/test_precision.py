"""``--precision auto`` takes bfloat16 where the hardware multiplies it, and only there."""

import pytest
import torch

from mlip_kernels.train import precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def processor(monkeypatch):
    """Let PyTorch report another processor."""

    def report(machine="x86_64", *, avx512_bf16=False, amx=False, mkldnn=True, operator=True, limit=None):
        monkeypatch.setattr("platform.machine", lambda: machine)
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: mkldnn)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: operator)
        for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(variable, raising=False)
        if limit:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)

    return report


@pytest.mark.parametrize(
    ("reported", "expected", "reason"),
    [
        ({"avx512_bf16": True}, "bfloat16", "AVX-512-BF16"),
        ({"amx": True}, "bfloat16", "AMX"),
        ({"avx512_bf16": True, "limit": "AVX512_CORE_BF16"}, "bfloat16", "AVX-512-BF16"),
        ({"machine": "aarch64"}, "bfloat16", "ARM"),
        # oneDNN's own answer is yes on any AVX-512, where it converts back and forth.
        ({"operator": True}, "float32", "neither AVX-512-BF16 nor AMX"),
        ({"avx512_bf16": True, "limit": "avx2"}, "float32", "ONEDNN_MAX_CPU_ISA=avx2"),
        ({"avx512_bf16": True, "mkldnn": False}, "float32", "oneDNN"),
        ({"machine": "aarch64", "operator": False}, "float32", "ARM"),
    ],
)
def test_auto_follows_the_processor(processor, reported, expected, reason):
    processor(**reported)
    chosen = precision.resolve("auto", CPU)
    assert chosen.name == expected
    assert reason in chosen.reason
    with chosen.autocast(CPU):
        assert torch.is_autocast_enabled("cpu") == (expected == "bfloat16")


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_follows_the_gpu(monkeypatch, native, expected):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert precision.resolve("auto", GPU).name == expected


@pytest.mark.parametrize("choice", ["bfloat16", "float32"])
def test_what_was_asked_for_is_taken_and_a_slow_choice_named(processor, choice):
    processor()
    chosen = precision.resolve(choice, CPU)
    assert chosen.name == choice
    assert ("float32 to be faster" in chosen.reason) == (choice == "bfloat16")
