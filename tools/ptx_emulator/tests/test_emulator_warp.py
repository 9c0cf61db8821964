"""Instructions by which the lanes of a warp talk to each other."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_emulator import Emulator
from ptx_text import entry, module

LANE = np.arange(32)
FULL = 0xFFFFFFFF


def run(body: str, *, results: int = 1, threads: int = 32) -> np.ndarray:
    """What each lane leaves in %r1 (and %r2, ...); %r0 is the lane, %s0 a value of its own."""
    stores = "".join(f"st.global.u32 [%x40+{4 * n}], %r{1 + n};" for n in range(results))
    text = f"""
        mov.u32 %r0, %tid.x; mul.lo.u32 %s0, %r0, 7; add.u32 %s0, %s0, 100;
        ld.param.u64 %x40, [target]; mul.wide.u32 %x41, %r0, {4 * results}; add.u64 %x40, %x40, %x41;
        {body}
        {stores}
    """
    target = np.zeros((threads, results), np.uint32)
    Emulator(90).launch(module(entry("kernel", ["u64 target"], text)), "kernel", 1, threads, [target])
    return target[:, 0] if results == 1 else target


def shuffle(mode: str, b: int, c: int) -> tuple[np.ndarray, np.ndarray]:
    """Source lane and predicate of each lane, after the definition in the PTX ISA."""
    segment, bound = c >> 8 & 31, c & 31
    highest = (LANE & segment) | (bound & ~segment & 31)
    lowest = LANE & segment
    source = {"up": LANE - b, "down": LANE + b, "bfly": LANE ^ b, "idx": lowest | (b & ~segment & 31)}[mode]
    inside = source >= highest if mode == "up" else source <= highest
    return np.where(inside, source, LANE), inside


WIDTHS = (32, 16, 8, 4, 2, 1)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("b", [0, 1, 3, 5, 16, 31])
def test_shuffle(mode: str, width: int, b: int):
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    body = f"shfl.sync.{mode}.b32 %r1|%p0, %s0, {b}, {c}, {FULL}; selp.b32 %r2, 1, 0, %p0;"
    found = run(body, results=2)
    source, inside = shuffle(mode, b, c)
    np.testing.assert_array_equal(found[:, 0], source * 7 + 100)
    np.testing.assert_array_equal(found[:, 1], inside)


def test_shuffle_by_a_different_amount_in_each_lane():
    found = run(f"sub.u32 %s1, 31, %r0; shfl.sync.idx.b32 %r1, %s0, %s1, 31, {FULL};")
    np.testing.assert_array_equal(found, (31 - LANE) * 7 + 100)


def test_shuffle_among_the_lanes_of_a_branch():
    body = """
        mov.u32 %r1, 0; setp.lt.u32 %p0, %r0, 8; @!%p0 bra REST;
        shfl.sync.bfly.b32 %r1, %s0, 1, 31, 255;
    REST:
    """
    np.testing.assert_array_equal(run(body), np.where(LANE < 8, (LANE ^ 1) * 7 + 100, 0))


VOTES = {"none": LANE < 0, "one": LANE == 5, "half": LANE % 2 == 0, "all": LANE >= 0}
CHOOSE = {
    "none": "setp.lt.u32 %p0, %r0, 0;",
    "one": "setp.eq.u32 %p0, %r0, 5;",
    "half": "and.b32 %s1, %r0, 1; setp.eq.u32 %p0, %s1, 0;",
    "all": "setp.ge.u32 %p0, %r0, 0;",
}


@pytest.mark.parametrize("negated", [False, True])
@pytest.mark.parametrize("who", VOTES)
def test_vote(who: str, negated: bool):
    predicate = "!%p0" if negated else "%p0"
    body = f"""
        {CHOOSE[who]}
        vote.sync.all.pred %p1, {predicate}, {FULL}; selp.b32 %r1, 1, 0, %p1;
        vote.sync.any.pred %p1, {predicate}, {FULL}; selp.b32 %r2, 1, 0, %p1;
        vote.sync.uni.pred %p1, {predicate}, {FULL}; selp.b32 %r3, 1, 0, %p1;
        vote.sync.ballot.b32 %r4, {predicate}, {FULL};
    """
    votes = VOTES[who] ^ negated
    ballot = sum(1 << int(lane) for lane in LANE[votes])
    expected = [votes.all(), votes.any(), votes.all() or not votes.any(), ballot]
    np.testing.assert_array_equal(run(body, results=4), np.tile(np.array(expected, np.uint32), (32, 1)))


@pytest.mark.parametrize("bits", [32, 64])
def test_match_any(bits: int):
    value = "rem.u32 %s1, %r0, 5;"
    if bits == 64:  # the values differ in their upper halves only
        value += "cvt.u64.u32 %x0, %s1; shl.b64 %x0, %x0, 40;"
    body = f"{value} match.any.sync.b{bits} %r1, {'%s1' if bits == 32 else '%x0'}, {FULL};"
    expected = [sum(1 << int(other) for other in LANE[lane % 5 == LANE % 5]) for lane in LANE]
    np.testing.assert_array_equal(run(body), np.array(expected, np.uint32))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("equal", [True, False])
def test_match_all(bits: int, equal: bool):
    value = "mov.u32 %s1, 9;" if equal else "setp.eq.u32 %p1, %r0, 3; selp.u32 %s1, 1, 9, %p1;"
    value += "cvt.u64.u32 %x0, %s1;"
    operand = "%s1" if bits == 32 else "%x0"
    body = f"{value} match.all.sync.b{bits} %r1|%p0, {operand}, {FULL}; selp.b32 %r2, 1, 0, %p0;"
    found = run(body, results=2)
    np.testing.assert_array_equal(found, np.tile(np.array([FULL if equal else 0, equal], np.uint32), (32, 1)))


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("add.u32", np.sum),
        ("add.s32", np.sum),
        ("min.u32", lambda v: v.astype(np.uint32).min()),
        ("max.u32", lambda v: v.astype(np.uint32).max()),
        ("min.s32", np.min),
        ("max.s32", np.max),
        ("and.b32", np.bitwise_and.reduce),
        ("or.b32", np.bitwise_or.reduce),
        ("xor.b32", np.bitwise_xor.reduce),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("mask", [FULL, 0x00FF00F0])
def test_redux(operation: str, expected, mask: int):
    values = (LANE * 0x08765431 - 0x70000000).astype(np.int64)
    values = (values & FULL).astype(np.uint32).view(np.int32)
    body = f"""
        mad.lo.u32 %s1, %r0, {0x08765431}, {(-0x70000000) & FULL};
        mov.u32 %r1, 0; shr.u32 %s2, {mask}, %r0; and.b32 %s2, %s2, 1; setp.eq.u32 %p0, %s2, 1;
        @!%p0 bra REST;
        redux.sync.{operation} %r1, %s1, {mask};
    REST:
    """
    inside = (mask >> LANE & 1).astype(bool)
    result = int(expected(values[inside])) & FULL
    np.testing.assert_array_equal(run(body), np.where(inside, result, 0).astype(np.uint32))


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("propagate", ["", ".NaN"])
@pytest.mark.parametrize(("operation", "expected"), [("min", -16.0), ("max", 15.0)])
def test_redux_of_floats(operation: str, expected: float, propagate: str, nan: bool):
    """Of sm_100; a NaN loses against a number, unless the instruction says otherwise."""
    poison = "setp.eq.u32 %p0, %r0, 7; @%p0 mov.f32 %f0, 0f7FFFFFFF;" if nan else ""
    body = f"""
        cvt.rn.f32.u32 %f0, %r0; sub.f32 %f0, %f0, 0f41800000; {poison}
        redux.sync.{operation}{propagate}.f32 %f1, %f0, {FULL}; mov.b32 %r1, %f1;
    """
    found = run(body).view(np.float32)
    np.testing.assert_array_equal(found, np.full(32, np.nan if nan and propagate else expected, np.float32))


def test_activemask_names_the_lanes_of_a_branch():
    body = """
        mov.u32 %r1, 0; setp.lt.u32 %p0, %r0, 5; @!%p0 bra REST;
        activemask.b32 %r1;
    REST:
    """
    np.testing.assert_array_equal(run(body), np.where(LANE < 5, 31, 0))


def test_elect_chooses_one_lane_and_tells_all():
    found = run(f"elect.sync %r1|%p0, {FULL}; selp.b32 %r2, 1, 0, %p0;", results=2)
    leader = int(found[0, 0])
    np.testing.assert_array_equal(found[:, 0], leader)
    np.testing.assert_array_equal(found[:, 1], leader == LANE)


def test_warp_barrier_orders_shared_memory_between_lanes():
    body = f"""
        mov.u32 %r5, pool; shl.b32 %r6, %r0, 2; add.u32 %r5, %r5, %r6; xor.b32 %r6, %r6, 4;
        mov.u32 %r7, pool; add.u32 %r7, %r7, %r6;
        st.shared.b32 [%r5], %s0; bar.warp.sync {FULL}; ld.shared.b32 %r1, [%r7];
    """
    text = body.replace("mov.u32 %r5, pool;", "{ .shared .align 4 .b8 pool[128]; mov.u32 %r5, pool;", 1)
    np.testing.assert_array_equal(run(text + "}"), (LANE ^ 1) * 7 + 100)
