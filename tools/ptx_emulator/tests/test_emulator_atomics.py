"""Atomic operations: each one's arithmetic over edge values, its old value, every space, and real contention."""

from __future__ import annotations

from collections.abc import Callable

import number_formats as exact
import numpy as np
import pytest
from edge_values import HALVES, WIDTHS, rows
from instruction_case import integer
from number_formats import FORMATS, decode, encode, is_nan
from ptx_emulator import Emulator
from ptx_text import entry, module

FULL = 0xFFFFFFFF
SPACES = ("global", "shared", "generic")


def on_integers(kind: str, function: Callable[[int, int], int]) -> Callable[[int, int], int]:
    mask = (1 << WIDTHS[kind]) - 1
    return lambda old, value: function(integer(old, kind), integer(value, kind)) & mask


def add_floats(kind: str) -> Callable[[int, int], int]:
    single = HALVES.get(kind, kind)

    def one(old: int, value: int) -> int:
        return encode(single, exact.add(decode(single, old), decode(single, value)))

    if kind not in HALVES:
        return one
    return lambda old, value: one(old & 0xFFFF, value & 0xFFFF) | one(old >> 16, value >> 16) << 16


OPERATIONS: dict[str, tuple[str, Callable[[int, int], int]]] = {}
for bits in (32, 64):
    OPERATIONS |= {
        f"and.b{bits}": (f"b{bits}", lambda old, value: old & value),
        f"or.b{bits}": (f"b{bits}", lambda old, value: old | value),
        f"xor.b{bits}": (f"b{bits}", lambda old, value: old ^ value),
        f"exch.b{bits}": (f"b{bits}", lambda old, value: value),
    }
    for sign in "us":
        kind = f"{sign}{bits}"
        OPERATIONS[f"min.{kind}"] = (kind, on_integers(kind, min))
        OPERATIONS[f"max.{kind}"] = (kind, on_integers(kind, max))
for kind in ("u32", "s32", "u64"):
    OPERATIONS[f"add.{kind}"] = (kind, on_integers(kind, lambda a, b: a + b))
OPERATIONS["inc.u32"] = ("u32", lambda old, limit: 0 if old >= limit else old + 1)
OPERATIONS["dec.u32"] = ("u32", lambda old, limit: limit if old == 0 or old > limit else old - 1)
for kind in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2"):
    noftz = "" if kind in ("f32", "f64") else ".noftz"
    OPERATIONS[f"add{noftz}.{kind}"] = (kind, add_floats(kind))


def same(kind: str, found: int, wanted: int) -> bool:
    if kind in HALVES:
        return all(same(HALVES[kind], found >> s & 0xFFFF, wanted >> s & 0xFFFF) for s in (0, 16))
    return found == wanted or (kind in FORMATS and is_nan(kind, found) and is_nan(kind, wanted))


def kernel(instruction: str, kind: str, space: str, *, old: bool, compare: bool = False) -> str:
    """One atomic operation per thread on a memory word of its own."""
    size = WIDTHS[kind] // 8
    register = {2: "%h", 4: "%r", 8: "%x"}[size]
    move = f"b{8 * size}"
    address = "%x10" if space == "global" else "%x11"
    dotted = "" if space == "generic" else f".{space}"
    operands = f"[{address}], {register}21" + (f", {register}22" if compare else "")
    form = f"{instruction.format(space=dotted)} " + (f"{register}23, {operands};" if old else f"{operands};")
    body = f"""
        mov.u32 %r0, %tid.x; mul.wide.u32 %x9, %r0, {size};
        ld.param.u64 %x0, [memory]; ld.param.u64 %x1, [values]; ld.param.u64 %x2, [others]; ld.param.u64 %x3, [olds];
        add.u64 %x10, %x0, %x9; add.u64 %x1, %x1, %x9; add.u64 %x2, %x2, %x9; add.u64 %x3, %x3, %x9;
        mov.u64 %x11, pool; add.u64 %x11, %x11, %x9;
        ld.global.{move} {register}20, [%x10]; st.shared.{move} [%x11], {register}20;
        ld.global.{move} {register}21, [%x1]; ld.global.{move} {register}22, [%x2]; mov.{move} {register}23, 0;
        {"cvta.shared.u64 %x11, %x11;" if space == "generic" else ""}
        {form}
        {"cvta.to.shared.u64 %x11, %x11;" if space == "generic" else ""}
        {"" if space == "global" else f"ld.shared.{move} {register}24, [%x11]; st.global.{move} [%x10], {register}24;"}
        st.global.{move} [%x3], {register}23;
    """
    parameters = ["u64 memory", "u64 values", "u64 others", "u64 olds"]
    return module(entry("kernel", parameters, body, registers=".shared .align 8 .b8 pool[8192];"))


def array(values: list[int], kind: str) -> np.ndarray:
    return np.array(values, dtype=f"u{WIDTHS[kind] // 8}")


def check(instruction: str, kind: str, space: str, function, *, old: bool, compare: bool = False) -> None:
    operands = rows((kind,) * (3 if compare else 2), limit=400)
    if compare:  # every other one finds what it compares with
        operands = [(a, a, c) if n % 2 else (a, b, c) for n, (a, b, c) in enumerate(operands)]
    columns = [array([row[n] for row in operands], kind) for n in range(len(operands[0]))]
    memory, olds = columns[0].copy(), np.zeros_like(columns[0])
    others = columns[2] if compare else columns[1]
    ptx = kernel(instruction, kind, space, old=old, compare=compare)
    launch = Emulator(90).launch(ptx, "kernel", 1, len(operands), [memory, columns[1], others, olds])
    assert launch.statistics.atomics == len(operands)
    for n, row in enumerate(operands):
        wanted = function(*row)
        assert same(kind, int(memory[n]), wanted), f"{instruction} of {[hex(v) for v in row]}: {memory[n]:#x}"
    if old:
        np.testing.assert_array_equal(olds, columns[0])


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_atom_updates_memory_and_returns_the_old_value(operation: str, space: str):
    kind, function = OPERATIONS[operation]
    check(f"atom{{space}}.{operation}", kind, space, function, old=True)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if not name.startswith("exch")])
def test_red_updates_memory(operation: str, space: str):
    kind, function = OPERATIONS[operation]
    check(f"red{{space}}.{operation}", kind, space, function, old=False)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_compare_and_swap(kind: str, space: str):
    def swap(old: int, expected: int, value: int) -> int:
        return value if old == expected else old

    check(f"atom{{space}}.cas.{kind}", kind, space, swap, old=True, compare=True)


@pytest.mark.parametrize("order", ["relaxed", "acquire", "release", "acq_rel"])
@pytest.mark.parametrize("scope", ["cta", "gpu", "sys"])
def test_order_and_scope_do_not_change_the_value(order: str, scope: str):
    kind, function = OPERATIONS["add.u32"]
    check(f"atom.{order}.{scope}{{space}}.add.u32", kind, "global", function, old=True)


def patterns(kind: str, values: np.ndarray) -> np.ndarray:
    """Numbers that ``kind`` holds exactly, as the words of memory."""
    single = HALVES.get(kind, kind)
    size = WIDTHS[single] // 8
    return np.array([encode(single, decode("f64", int(v))) for v in values.view(np.uint64)], dtype=f"u{size}")


@pytest.mark.parametrize(("lanes", "kind"), [(2, "f32"), (4, "f32"), (2, "f16x2"), (4, "bf16x2"), (8, "f16")])
@pytest.mark.parametrize("form", ["atom", "red"])
def test_vector_add(form: str, lanes: int, kind: str):
    register, width = "%h" if kind == "f16" else "%r", WIDTHS[kind]
    noftz = "" if kind == "f32" else ".noftz"
    values = ", ".join(f"{register}{n + 8}" for n in range(lanes))
    olds = ", ".join(f"{register}{n + 16}" for n in range(lanes))
    loads = "".join(f"ld.global.b{width} {register}{n + 8}, [%x1+{n * width // 8}];" for n in range(lanes))
    target = f"{{{olds}}}, " if form == "atom" else ""
    body = f"""
        ld.param.u64 %x0, [memory]; ld.param.u64 %x1, [values]; {loads}
        {form}.global.add{noftz}.v{lanes}.{kind} {target}[%x0], {{{values}}};
    """
    count = lanes * (2 if kind in HALVES else 1)
    start, added = np.arange(1.0, count + 1), np.arange(float(count)) / 2
    room = np.zeros(64, np.uint8)
    memory = room[-room.ctypes.data % 16 :][: count * width // (16 if kind in HALVES else 8)]
    memory[:] = patterns(kind, start).view(np.uint8)
    ptx = module(entry("kernel", ["u64 memory", "u64 values"], body))
    Emulator(90).launch(ptx, "kernel", 1, 1, [memory, patterns(kind, added)])
    np.testing.assert_array_equal(memory, patterns(kind, start + added).view(np.uint8))


@pytest.mark.parametrize("schedule", ["round_robin", "reversed", "random"])
def test_contended_counter_hands_out_every_ticket_once(schedule: str):
    body = """
        ld.param.u64 %x0, [counter]; ld.param.u64 %x1, [tickets];
        atom.global.add.u32 %r1, [%x0], 1;
        mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mov.u32 %r4, %tid.x; mad.lo.u32 %r2, %r2, %r3, %r4;
        mul.wide.u32 %x2, %r2, 4; add.u64 %x1, %x1, %x2; st.global.u32 [%x1], %r1;
    """
    counter, tickets = np.zeros(1, np.uint32), np.zeros(3 * 96, np.uint32)
    ptx = module(entry("kernel", ["u64 counter", "u64 tickets"], body))
    Emulator(90, schedule=schedule, seed=3).launch(ptx, "kernel", 3, 96, [counter, tickets])
    assert counter[0] == 288
    np.testing.assert_array_equal(np.sort(tickets), np.arange(288))


def test_compare_and_swap_loop_sums_what_all_lanes_add():
    body = """
        ld.param.u64 %x0, [memory]; mov.u32 %r5, %tid.x; cvt.rn.f32.u32 %f1, %r5;
        ld.relaxed.gpu.global.b32 %r1, [%x0];
    AGAIN:
        mov.b32 %f0, %r1; add.f32 %f2, %f0, %f1; mov.b32 %r2, %f2; mov.b32 %r3, %r1;
        atom.global.cas.b32 %r1, [%x0], %r3, %r2;
        setp.ne.u32 %p0, %r1, %r3; @%p0 bra AGAIN;
    """
    memory = np.zeros(1, np.float32)
    Emulator(90).launch(module(entry("kernel", ["u64 memory"], body)), "kernel", 1, 64, [memory])
    assert memory[0] == 63 * 32
