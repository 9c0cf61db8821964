"""Variables of a module: initialisers, state spaces, addresses in initialisers, and what outlives a launch."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_emulator import Emulator, PtxError
from ptx_text import entry, module


def launch(ptx: str, arguments: list, *, block: int = 1, grid: int = 1):
    return Emulator(90).launch(ptx, "kernel", grid, block, arguments)


INITIALISED = [
    ("u8", "{1, 2, 250}", [1, 2, 250]),
    ("s16", "{-1, 300, -32768}", [-1, 300, -32768]),
    ("u32", "{0xFFFFFFFF, 7}", [0xFFFFFFFF, 7]),
    ("s64", "{-5, 9223372036854775807}", [-5, 2**63 - 1]),
    ("f32", "{0f3F800000, 2.5, -1.0}", [1.0, 2.5, -1.0]),
    ("f64", "{0d3FF8000000000000, 1e10}", [1.5, 1e10]),
]
NUMPY = {"u8": "u1", "s16": "i2", "u32": "u4", "s64": "i8", "f32": "f4", "f64": "f8"}


@pytest.mark.parametrize("space", ["global", "const"])
@pytest.mark.parametrize(("kind", "initialiser", "expected"), INITIALISED, ids=lambda value: str(value)[:12])
def test_initialised_array(space: str, kind: str, initialiser: str, expected: list):
    size = np.dtype(NUMPY[kind]).itemsize
    count = len(expected)
    register = {1: "%h", 2: "%h", 4: "%r", 8: "%x"}[size]
    bits = 8 * size
    lines = ["ld.param.u64 %x20, [target];"]
    for n in range(count + 1):
        lines.append(
            f"ld.{space}.b{bits} {register}1, [table+{n * size}]; st.global.b{bits} [%x20+{n * size}], {register}1;"
        )
    variables = f".{space} .align 8 .{kind} table[{count + 1}] = {initialiser};\n"
    target = np.ones(count + 1, NUMPY[kind])
    launch(module(entry("kernel", ["u64 target"], "\n".join(lines)), variables=variables), [target])
    assert target.tolist() == [*expected, 0]  # what has no initialiser is zero


@pytest.mark.parametrize(
    "declaration",
    [".global .u32 grid[2][3] = {{1, 2, 3}, {4, 5, 6}};", ".global .u32 a[2] = {7, 8};\n.global .u64 b = a+4;"],
    ids=["nested braces", "address with an offset"],
)
def test_initialiser_that_is_not_understood_is_an_error(declaration: str):
    with pytest.raises(PtxError, match=r"PTX line \d+"):
        Emulator(90).load(module(entry("kernel", ["u64 target"], ""), variables=declaration + "\n"))


def test_address_of_a_variable_is_generic_after_cvta():
    variables = ".const .align 4 .u32 table[2] = {3, 4};\n"
    body = """
        ld.param.u64 %x0, [target];
        mov.u64 %x1, table; ld.const.u32 %r0, [%x1]; cvta.const.u64 %x2, %x1; ld.u32 %r1, [%x2+4];
        st.global.v2.b32 [%x0], {%r0, %r1};
    """
    target = np.zeros(2, np.uint32)
    launch(module(entry("kernel", ["u64 target"], body), variables=variables), [target])
    assert target.tolist() == [3, 4]


def test_global_variable_starts_every_launch_with_its_initial_value():
    """Unlike on a GPU, where it keeps what the last launch left: here no test depends on the one before."""
    variables = ".global .u32 counter = 40;\n"
    body = """
        ld.param.u64 %x0, [target];
        ld.global.u32 %r0, [counter]; add.u32 %r0, %r0, 1; st.global.u32 [counter], %r0; st.global.u32 [%x0], %r0;
    """
    ptx = module(entry("kernel", ["u64 target"], body), variables=variables)
    target = np.zeros(1, np.uint32)
    for _ in range(2):
        launch(ptx, [target])
        assert target[0] == 41


def test_registers_of_an_inner_scope_hide_those_outside():
    body = """
        ld.param.u64 %x0, [target];
        mov.u32 %r0, 1;
        {
            .reg .b32 %r0;
            mov.u32 %r0, 2;
            st.global.b32 [%x0], %r0;
        }
        st.global.b32 [%x0+4], %r0;
    """
    target = np.zeros(2, np.uint32)
    launch(module(entry("kernel", ["u64 target"], body)), [target])
    assert target.tolist() == [2, 1]


SPECIAL = {
    "%tid.x": lambda t: t % 4,
    "%tid.y": lambda t: t // 4 % 3,
    "%tid.z": lambda t: t // 12,
    "%ntid.x": lambda t: 4 + 0 * t,
    "%ntid.y": lambda t: 3 + 0 * t,
    "%ntid.z": lambda t: 5 + 0 * t,
    "%laneid": lambda t: t % 32,
    "%warpid": lambda t: t // 32,
    "%nwarpid": lambda t: 2 + 0 * t,
    "%ctaid.x": lambda t: 0 * t,
    "%nctaid.x": lambda t: 1 + 0 * t,
    "%nctaid.y": lambda t: 1 + 0 * t,
    "%nctaid.z": lambda t: 1 + 0 * t,
    "%lanemask_eq": lambda t: 1 << t % 32,
    "%lanemask_lt": lambda t: (1 << t % 32) - 1,
    "%lanemask_le": lambda t: (2 << t % 32) - 1,
    "%lanemask_gt": lambda t: 2**32 - (2 << t % 32),
    "%lanemask_ge": lambda t: 2**32 - (1 << t % 32),
}


@pytest.mark.parametrize("register", SPECIAL)
def test_special_register(register: str):
    body = f"""
        ld.param.u64 %x0, [target];
        mov.u32 %r0, %tid.y; mov.u32 %r1, %tid.z; mad.lo.u32 %r0, %r1, 3, %r0;
        mov.u32 %r1, %tid.x; mad.lo.u32 %r0, %r0, 4, %r1;
        mov.u32 %r2, {register};
        mul.wide.u32 %x1, %r0, 4; add.u64 %x0, %x0, %x1; st.global.b32 [%x0], %r2;
    """
    target = np.zeros(60, np.uint32)
    Emulator(90).launch(module(entry("kernel", ["u64 target"], body)), "kernel", 1, (4, 3, 5), [target])
    np.testing.assert_array_equal(target, SPECIAL[register](np.arange(60)))


def test_block_index_runs_over_the_whole_grid():
    body = """
        ld.param.u64 %x0, [target];
        mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ctaid.y; mov.u32 %r2, %ctaid.z;
        mov.u32 %r3, %nctaid.x; mov.u32 %r4, %nctaid.y;
        mad.lo.u32 %r5, %r2, %r4, %r1; mad.lo.u32 %r5, %r5, %r3, %r0;
        mul.wide.u32 %x1, %r5, 4; add.u64 %x0, %x0, %x1; add.u32 %r5, %r5, 1; st.global.b32 [%x0], %r5;
    """
    target = np.zeros(24, np.uint32)
    Emulator(90).launch(module(entry("kernel", ["u64 target"], body)), "kernel", (2, 3, 4), 1, [target])
    np.testing.assert_array_equal(target, np.arange(24) + 1)
