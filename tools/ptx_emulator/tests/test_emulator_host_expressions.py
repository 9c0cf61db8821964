"""C++ expressions compiled by nvcc and emulated give what the host's own compiler gives, bit for bit."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
from compiled_sources import library, ptx
from edge_values import conversions, integers
from ptx_emulator import Emulator

FOLDER = Path(__file__).with_name("host_expressions")
NUMPY = {"int": "i4", "unsigned": "u4", "long long": "i8", "unsigned long long": "u8", "float": "f4", "double": "f8"}
NUMPY |= {"short": "i2", "unsigned short": "u2", "signed char": "i1", "unsigned char": "u1"}
EXPRESSIONS = re.findall(
    r"^EXPRESSION\((\w+), ([\w ]+), ([\w ]+),", (FOLDER / "expressions.h").read_text(), re.MULTILINE
)
COUNT, BLOCK = 4096, 128


def operand(kind: str, seed: int) -> np.ndarray:
    """Edge values in random order, and noise."""
    generator = np.random.default_rng(seed)
    dtype = np.dtype(NUMPY[kind])
    if dtype.kind == "f":
        edge = np.array(conversions({4: "f32", 8: "f64"}[dtype.itemsize]), f"u{dtype.itemsize}").view(dtype)
        noise = (generator.standard_normal(COUNT) * 10.0 ** generator.integers(-6, 7, COUNT)).astype(dtype)
    else:
        edge = np.array(integers(8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)
        noise = generator.integers(0, 1 << 8 * dtype.itemsize, COUNT, dtype=f"u{dtype.itemsize}").view(dtype)
        noise[::4] %= 100
    return np.where(generator.random(COUNT) < 0.6, generator.choice(edge, COUNT), noise).astype(dtype)


def test_there_are_expressions():
    assert len(EXPRESSIONS) > 100
    assert len({name for name, _, _ in EXPRESSIONS}) == len(EXPRESSIONS)


@pytest.fixture(scope="module", params=[80, 90])
def compiled(request):
    """The architecture, the kernels, and the same expressions for the host."""
    kernels = Emulator(request.param).load(ptx("host_expressions/device.cu", request.param))
    return request.param, kernels, library("host_expressions/host.cpp")


@pytest.mark.parametrize(("name", "kind", "result"), EXPRESSIONS, ids=[name for name, _, _ in EXPRESSIONS])
def test_expression_gives_what_the_host_gives(compiled, name: str, kind: str, result: str):
    arch, kernels, host = compiled
    operands = [operand(kind, seed) for seed in range(3)]
    emulated, wanted = np.zeros(COUNT, NUMPY[result]), np.zeros(COUNT, NUMPY[result])
    Emulator(arch).launch(kernels, f"device_{name}", COUNT // BLOCK, BLOCK, [*operands, emulated, COUNT])
    on_host = getattr(host, f"host_{name}")
    on_host(*(ctypes.c_void_p(array.ctypes.data) for array in (*operands, wanted)), COUNT)
    assert_same(emulated, wanted, operands)


def assert_same(emulated: np.ndarray, wanted: np.ndarray, operands: list[np.ndarray]) -> None:
    """Bitwise equal, NaN equal to NaN."""
    patterns = f"u{wanted.dtype.itemsize}"
    same = (emulated.view(patterns) == wanted.view(patterns)) | ((emulated != emulated) & (wanted != wanted))
    if not same.all():
        n = int(np.argmin(same))
        shown = ", ".join(repr(array[n]) for array in operands)
        raise AssertionError(f"{(~same).sum()} of {len(same)} differ; of {shown}: {emulated[n]!r}, host {wanted[n]!r}")
