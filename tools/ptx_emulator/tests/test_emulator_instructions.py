"""Every arithmetic instruction, one at a time, over edge values, against exact arithmetic: bit for bit."""

from __future__ import annotations

import subprocess
from fnmatch import fnmatch

import comparison_cases
import conversion_cases
import float_cases
import integer_cases
import numpy as np
import pytest
from compiled_sources import cuda_home
from edge_values import HALVES, WIDTHS, rows
from instruction_case import Case
from number_formats import FORMATS, is_nan
from ptx_emulator import Emulator, UnsupportedError
from ptx_text import elementwise, module

CASES = integer_cases.CASES + float_cases.CASES + conversion_cases.CASES + comparison_cases.CASES
REFUSED = ("*.cc.*", "*.sat.s32", "mul24.hi.*", "mad24.hi.*", "*.xorsign.*")
REFUSED += ("prmt.b32.*", "bmsk.*", "szext.*", "dp2a.*")
"""What the emulator does not know, and no kernel here needs; take a pattern away where it learns one."""


def is_refused(case: Case) -> bool:
    return any(fnmatch(case.instruction, pattern) for pattern in REFUSED)


BLOCK = 128


def text() -> str:
    """One module with a kernel for each case."""
    return module(*(elementwise(case.kernel, case.text, case.inputs, case.outputs) for case in CASES))


@pytest.fixture(scope="module")
def program():
    return Emulator(90).load(text())


def test_every_case_is_ptx(tmp_path):
    """NVIDIA's own assembler takes each of them."""
    source = tmp_path / "cases.ptx"
    source.write_text(text())
    command = [str(cuda_home() / "bin" / "ptxas"), "-arch=sm_90a", "-O0", str(source), "-o", str(tmp_path / "cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]


def array(values: list[int], kind: str) -> np.ndarray:
    return np.array(values, dtype=np.dtype(f"u{WIDTHS[kind] // 8}"))


def same(kind: str, found: int, wanted: int) -> bool:
    """Equal bit for bit, except that one NaN is as good as another."""
    if kind in HALVES:
        return all(same(HALVES[kind], found >> s & 0xFFFF, wanted >> s & 0xFFFF) for s in (0, 16))
    return found == wanted or (kind in FORMATS and is_nan(kind, found) and is_nan(kind, wanted))


@pytest.mark.parametrize("case", [case for case in CASES if not is_refused(case)], ids=lambda case: case.identifier)
def test_instruction_computes_what_its_definition_says(program, case: Case):
    operands = rows(case.inputs)
    sources = [array([row[n] for row in operands], kind) for n, kind in enumerate(case.inputs)]
    results = [np.zeros(len(operands), dtype=f"u{WIDTHS[kind] // 8}") for kind in case.outputs]
    blocks = -(-len(operands) // BLOCK)
    launch = Emulator(90).launch(program, case.kernel, blocks, BLOCK, [*sources, *results, len(operands)])
    assert launch.opcodes[case.instruction] >= len(operands) // 32
    for lane, row in enumerate(operands):
        wanted = case.expected(*row)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for kind, result, value in zip(case.outputs, results, wanted, strict=True):
            found = int(result[lane])
            shown = ", ".join(f"{v:#x}" for v in row)
            assert same(kind, found, value), f"{case.instruction} of {shown}: {found:#x} instead of {value:#x}"


@pytest.mark.parametrize("case", [case for case in CASES if is_refused(case)], ids=lambda case: case.identifier)
def test_unknown_form_is_refused_and_named(program, case: Case):
    assert case.instruction in program.kernels[case.kernel].unsupported
    with pytest.raises(UnsupportedError, match=case.instruction):
        Emulator(90).launch(program, case.kernel, 1, 1, [0] * (len(case.inputs) + len(case.outputs) + 1))
