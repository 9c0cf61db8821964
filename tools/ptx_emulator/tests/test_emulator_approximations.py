"""Instructions that a GPU approximates: right to a few roundings, exact where the PTX ISA fixes a special value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from number_formats import is_nan
from ptx_emulator import Emulator
from ptx_text import elementwise, module
from tolerances import assert_close, assert_identical

INFINITY, NAN = math.inf, math.nan
WIDE = np.concatenate([2.0 ** np.linspace(-120, 120, 481), -(2.0 ** np.linspace(-120, 120, 481))])
POSITIVE = 2.0 ** np.linspace(-125, 125, 1000)
MODERATE = np.linspace(-20, 20, 1000)  # zero is not among them


def inverse_root(x: np.ndarray) -> np.ndarray:
    return 1 / np.sqrt(x)


UNARY = {  # instruction: function, inputs, special operands, their results
    "ex2.approx.f32": (np.exp2, np.linspace(-120, 120, 999), (-INFINITY, INFINITY, -0.0, NAN), (0, INFINITY, 1, NAN)),
    "lg2.approx.f32": (np.log2, POSITIVE, (0.0, -0.0, -1, INFINITY, NAN), (-INFINITY, -INFINITY, NAN, INFINITY, NAN)),
    "rcp.approx.f32": (np.reciprocal, WIDE, (0.0, -0.0, INFINITY, NAN), (INFINITY, -INFINITY, 0.0, NAN)),
    "sqrt.approx.f32": (np.sqrt, POSITIVE, (0.0, -0.0, -1.0, INFINITY, NAN), (0.0, -0.0, NAN, INFINITY, NAN)),
    "rsqrt.approx.f32": (inverse_root, POSITIVE, (0.0, -0.0, -1, INFINITY, NAN), (INFINITY, -INFINITY, NAN, 0.0, NAN)),
    "sin.approx.f32": (np.sin, MODERATE, (0.0, -0.0, INFINITY, NAN), (0.0, -0.0, NAN, NAN)),
    "cos.approx.f32": (np.cos, MODERATE, (0.0, -0.0, INFINITY, NAN), (1.0, 1.0, NAN, NAN)),
    "tanh.approx.f32": (np.tanh, MODERATE, (0.0, -0.0, INFINITY, -INFINITY, NAN), (0.0, -0.0, 1.0, -1.0, NAN)),
}
UNARY |= {name.replace("approx", "approx.ftz"): row for name, row in UNARY.items() if not name.startswith("tanh")}
UNARY |= {
    "rsqrt.approx.f64": (inverse_root, POSITIVE, (0.0, -1.0, INFINITY, NAN), (INFINITY, NAN, 0.0, NAN)),
    "rsqrt.approx.ftz.f64": (inverse_root, POSITIVE, (0.0, -1.0, INFINITY, NAN), (INFINITY, NAN, 0.0, NAN)),
    "rcp.approx.ftz.f64": (np.reciprocal, WIDE, (0.0, -0.0, INFINITY, NAN), (INFINITY, -INFINITY, 0.0, NAN)),
}
HALVES = {
    "ex2.approx.f16": (np.exp2, np.linspace(-14, 15, 100)),
    "ex2.approx.ftz.bf16": (np.exp2, np.linspace(-100, 100, 100)),
    "tanh.approx.f16": (np.tanh, np.linspace(-4, 4, 100)),
    "tanh.approx.bf16": (np.tanh, np.linspace(-4, 4, 100)),
}
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
ACCURACY = {"rcp.approx.ftz.f64": torch.float32, "rsqrt.approx.ftz.f64": torch.float32}  # the upper half of a double


def run(instruction: str, kind: str, *operands: torch.Tensor) -> torch.Tensor:
    text = f"{instruction} {{d}}, " + ", ".join(["{a}", "{b}"][: len(operands)]) + ";"
    ptx = module(elementwise("kernel", text, [kind] * len(operands), [kind]))
    result = torch.full_like(operands[0], NAN)
    count = result.numel() // (2 if kind.endswith("x2") else 1)
    launch = Emulator(90).launch(ptx, "kernel", -(-count // 128), 128, [*operands, result, count])
    assert launch.opcodes[instruction] >= count // 32
    return result


def assert_relatively_close(actual: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    assert_close((actual.double() / truth).to(dtype), torch.ones_like(truth), name=name)


@pytest.mark.parametrize("instruction", UNARY)
def test_approximation_is_right_to_a_few_roundings(instruction: str):
    function, inputs, _, _ = UNARY[instruction]
    kind = instruction.rsplit(".", 1)[1]
    x = torch.from_numpy(inputs).to(DTYPES[kind])
    truth = torch.from_numpy(function(x.double().numpy()))
    actual = run(instruction, kind, x)
    if instruction[:3] in ("sin", "cos", "lg2"):  # absolute error: the result passes through zero
        assert_close(actual, truth, name=instruction)
    else:
        assert_relatively_close(actual, truth, ACCURACY.get(instruction, DTYPES[kind]), instruction)


@pytest.mark.parametrize("instruction", UNARY)
def test_approximation_of_special_values(instruction: str):
    _, _, special, results = UNARY[instruction]
    kind = instruction.rsplit(".", 1)[1]
    actual = run(instruction, kind, torch.tensor(special, dtype=DTYPES[kind]))
    expected = torch.tensor(results, dtype=DTYPES[kind])
    assert_identical(actual, expected, name=instruction)
    assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


@pytest.mark.parametrize("instruction", ["ex2.approx.ftz.f32", "lg2.approx.ftz.f32", "rcp.approx.ftz.f32"])
def test_ftz_approximation_takes_subnormals_for_zeros(instruction: str):
    expected = run(instruction, "f32", torch.tensor([0.0, -0.0]))
    assert_identical(run(instruction, "f32", torch.tensor([1e-40, -1e-40])), expected)


@pytest.mark.parametrize("instruction", ["div.approx.f32", "div.full.f32", "div.approx.ftz.f32", "div.full.ftz.f32"])
def test_approximate_division(instruction: str):
    a, b = torch.from_numpy(MODERATE).float() * 3, torch.from_numpy(POSITIVE).sqrt().float()
    assert_relatively_close(run(instruction, "f32", a, b), a.double() / b.double(), torch.float32, instruction)
    a, b = torch.tensor([1.0, -1.0, 0.0, NAN, 1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0, INFINITY])
    assert_identical(run(instruction, "f32", a, b), torch.tensor([INFINITY, -INFINITY, NAN, NAN, 0.0]))


@pytest.mark.parametrize("packed", ["", "x2"])
@pytest.mark.parametrize("instruction", HALVES)
def test_half_precision_approximation(instruction: str, packed: str):
    function, inputs = HALVES[instruction]
    kind = instruction.rsplit(".", 1)[1]
    x = torch.from_numpy(inputs).to(DTYPES[kind])
    actual = run(instruction + packed, kind + packed, x)
    assert_relatively_close(actual, torch.from_numpy(function(x.double().numpy())), DTYPES[kind], instruction)
    nan = run(instruction + packed, kind + packed, torch.full((2,), NAN, dtype=DTYPES[kind]))
    assert all(is_nan(kind, int(pattern) & 0xFFFF) for pattern in nan.view(torch.int16))
