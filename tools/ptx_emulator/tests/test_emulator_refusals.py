"""What the emulator does not know is an error that names the instruction and its line, never a guess."""

from __future__ import annotations

import re

import numpy as np
import pytest
from ptx_emulator import Emulator, PtxError, UnsupportedError
from ptx_text import HEADER, entry, module

UNKNOWN = [
    "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%x0, %x1}, {%x2}, {%x3}, {%x0, %x1};",
    "mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%x0, %x1, %x2, %x3}, {%x4, %x5}, {%x6}, {%x0, %x1, %x2, %x3};",
    "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%r0, %r1}, {%r2}, {%r3}, {%r0, %r1};",
    "mma.sync.aligned.m16n8k16.row.col.satfinite.s32.s8.s8.s32 {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r6}, "
    "{%r0, %r1, %r2, %r3};",
    "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%r0, %r1, %r2, %r3}, {%r4, %r5, %r6, %r7}, {%r8, %r9}, "
    "{%r0, %r1, %r2, %r3};",
    "wmma.load.a.sync.aligned.row.m16n16k16.f16 {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, [%x0];",
    "cvt.rn.satfinite.e4m3x2.f32 %h0, %f0, %f1;",
    "cvt.rn.f16x2.e4m3x2 %r0, %h0;",
    "mbarrier.init.shared.b64 [%r0], 1;",
    "cp.async.mbarrier.arrive.shared.b64 [%r0];",
    "cp.async.bulk.commit_group;",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0], [%x0], 16, [%r1];",
    "cp.async.cg.shared.global [%r0], [%x0], 16, %p0;",
    "barrier.cluster.arrive;",
    "barrier.cluster.wait;",
    "fns.b32 %r0, %r1, %r2, %r3;",
    "brkpt;",
    "mov.u64 %x0, %clock64;",
    "tex.2d.v4.f32.f32 {%f0, %f1, %f2, %f3}, [%x0, {%f4, %f5}];",
    "fma.rn.oob.f16 %h0, %h1, %h2, %h3;",
    "min.relu.s32 %r0, %r1, %r2;",
    "add.cc.u32 %r0, %r1, %r2;",
    "ld.shared::cluster.u32 %r0, [%r1];",
    "ld.mmio.relaxed.sys.global.u32 %r0, [%x0];",
    "mul.lo.new.s32 %r0, %r1, %r2;",
    "lop3.or.b32 %r0|%p0, %r1, %r2, %r3, 0x3F, %p1;",
    "mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r6, %r7}, "
    "{%r0, %r1, %r2, %r3}, %r8, 0x0;",
    "redux.sync.max.abs.f32 %f0, %f1, 0xFFFFFFFF;",
    "shfl.bfly.b32 %r0, %r1, 1, 31;",
    "vote.ballot.b32 %r0, %p0;",
    "add.b32 %r0, %r1, %r2;",
    "add.u8 %h0, %h1, %h2;",
    "frobnicate.u32 %r0, %r1;",
]


@pytest.mark.parametrize("instruction", UNKNOWN, ids=lambda text: text.split()[0])
def test_unknown_instruction_names_itself_and_its_line(instruction: str):
    ptx = module(entry("kernel", ["u64 x"], f"mov.u32 %r0, 1;\n{instruction}\n"))
    line = next(n for n, text in enumerate(ptx.splitlines(), 1) if instruction in text)
    named = "%clock64" if "%clock64" in instruction else instruction.split()[0].rstrip(";")
    assert f"PTX line {line}:" in Emulator(90).load(ptx).kernels["kernel"].unsupported
    with pytest.raises(UnsupportedError, match=re.escape(named)) as caught:
        Emulator(90).launch(ptx, "kernel", 1, 1, [0])
    assert "kernel" in str(caught.value)


def test_branch_through_a_table_is_refused():
    body = "TABLE: .branchtargets ZERO, ONE;\nbrx.idx %r0, TABLE;\nZERO: ONE:\n"
    with pytest.raises(UnsupportedError, match="branchtargets"):
        Emulator(90).launch(module(entry("kernel", ["u64 x"], body)), "kernel", 1, 1, [0])


def test_function_call_is_refused():
    function = ".func helper(.param .b32 value)\n{\n    ret;\n}\n"
    body = "{ .param .b32 argument0; st.param.b32 [argument0], %r0; call.uni helper, (argument0); }"
    with pytest.raises(UnsupportedError, match=r"\.param|call"):
        Emulator(90).launch(module(function, entry("kernel", ["u64 x"], body)), "kernel", 1, 1, [0])


def test_other_kernels_of_the_module_still_run():
    good = "ld.param.u64 %x0, [x]; mov.u32 %r0, 6; st.global.u32 [%x0], %r0;"
    ptx = module(entry("bad", ["u64 x"], "brkpt;"), entry("good", ["u64 x"], good))
    target = np.zeros(1, np.uint32)
    Emulator(90).launch(ptx, "good", 1, 1, [target])
    assert target[0] == 6
    assert Emulator(90).load(ptx).kernels["good"].unsupported is None


BROKEN = [
    "ld.global.u32 %r0, [%x0;",
    "add.u32 %r0, %r1;",
    "add.u32 %r0, %r1, %undeclared;",
    "bra NOWHERE;",
    "@%p99 mov.u32 %r0, 1;",
]


@pytest.mark.parametrize("line", BROKEN)
def test_text_that_is_not_ptx_is_an_error_with_its_line(line: str):
    ptx = module(entry("kernel", ["u64 x"], line))
    try:
        unsupported = Emulator(90).load(ptx).kernels["kernel"].unsupported
    except PtxError as error:
        unsupported = str(error)
    assert re.search(r"PTX line \d+", unsupported)


def test_text_that_ends_too_early_is_an_error():
    with pytest.raises(PtxError):
        Emulator(90).load(HEADER + ".visible .entry kernel()\n{\n    .reg .b32 %r<4>;\n    mov.u32 %r0, 1;\n")


def simple() -> str:
    return module(entry("kernel", ["u64 x", "u32 n"], ""))


@pytest.mark.parametrize(
    ("grid", "block", "arguments", "name"),
    [
        (1, 32, [0], "arguments"),
        (1, 32, [0, 1, 2], "arguments"),
        (1, 1025, [0, 1], "block"),
        (1, (33, 32, 1), [0, 1], "block"),
        ((1, 1, 1, 1), 32, [0, 1], "grid"),
        (0, 32, [0, 1], "grid"),
        (1, 0, [0, 1], "block"),
    ],
    ids=str,
)
def test_impossible_launch_is_a_value_error(grid, block, arguments: list, name: str):
    with pytest.raises(ValueError, match=name):
        Emulator(90).launch(simple(), "kernel", grid, block, arguments)


def test_unknown_kernel_schedule_and_argument_are_errors():
    with pytest.raises(ValueError, match="nobody"):
        Emulator(90).launch(simple(), "nobody", 1, 1, [0, 1])
    with pytest.raises(ValueError, match="schedule"):
        Emulator(90, schedule="alphabetical")
    with pytest.raises(TypeError, match="argument 0"):
        Emulator(90).launch(simple(), "kernel", 1, 1, ["text", 1])
    with pytest.raises(ValueError, match="argument 1"):
        Emulator(90).launch(simple(), "kernel", 1, 1, [0, b"\0" * 8])
