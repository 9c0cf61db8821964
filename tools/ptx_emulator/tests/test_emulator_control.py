"""Control flow: predication, divergence and reconvergence, loops, early return."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_emulator import Emulator
from ptx_text import entry, module

SCHEDULES = ("round_robin", "reversed", "random")


def run(body: str, *, threads: int = 96, schedule: str = "round_robin") -> np.ndarray:
    """What each thread leaves in %r1; %r0 is its index."""
    text = f"""
        mov.u32 %r0, %tid.x; mov.u32 %r1, 0;
        {body}
    END:
        ld.param.u64 %x40, [target]; mul.wide.u32 %x41, %r0, 4; add.u64 %x40, %x40, %x41; st.global.u32 [%x40], %r1;
    """
    target = np.zeros(threads, np.uint32)
    ptx = module(entry("kernel", ["u64 target"], text))
    Emulator(90, schedule=schedule, seed=5).launch(ptx, "kernel", 1, threads, [target])
    return target


THREAD = np.arange(96)


def test_guard_and_its_negation():
    found = run("setp.lt.u32 %p0, %r0, 40; @%p0 mov.u32 %r1, 1; @!%p0 mov.u32 %r1, 2;")
    np.testing.assert_array_equal(found, np.where(THREAD < 40, 1, 2))


@pytest.mark.parametrize("branch", ["bra", "bra.uni"])
def test_forward_branch_taken_by_all(branch: str):
    np.testing.assert_array_equal(run(f"{branch} OVER; mov.u32 %r1, 9; OVER: add.u32 %r1, %r1, 1;"), 1 + 0 * THREAD)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nested_branches_and_what_follows_them(schedule: str):
    body = """
        and.b32 %r2, %r0, 1; setp.eq.u32 %p0, %r2, 0; @%p0 bra EVEN;
        and.b32 %r2, %r0, 2; setp.eq.u32 %p1, %r2, 0; @%p1 bra ODD_LOW;
        add.u32 %r1, %r1, 1; bra JOIN_ODD;
    ODD_LOW:
        add.u32 %r1, %r1, 10;
    JOIN_ODD:
        add.u32 %r1, %r1, 100; bra JOIN;
    EVEN:
        setp.gt.u32 %p2, %r0, 50; @!%p2 bra JOIN;
        add.u32 %r1, %r1, 1000;
    JOIN:
        add.u32 %r1, %r1, 10000;
    """
    odd = np.where(THREAD & 2, 101, 110)
    expected = np.where(THREAD & 1, odd, np.where(THREAD > 50, 1000, 0)) + 10000
    np.testing.assert_array_equal(run(body, schedule=schedule), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_loops_with_different_trip_counts(schedule: str):
    body = """
        rem.u32 %r2, %r0, 7; mov.u32 %r3, 0;
    OUTER:
        setp.ge.u32 %p0, %r3, %r2; @%p0 bra OUT;
        mov.u32 %r4, 0;
    INNER:
        add.u32 %r1, %r1, 1; add.u32 %r4, %r4, 1; setp.le.u32 %p1, %r4, %r3; @%p1 bra INNER;
        add.u32 %r3, %r3, 1; bra OUTER;
    OUT:
        add.u32 %r1, %r1, 1000;
    """
    trips = THREAD % 7
    np.testing.assert_array_equal(run(body, schedule=schedule), trips * (trips + 1) // 2 + 1000)


@pytest.mark.parametrize("leave", ["ret", "exit", "ret.uni"])
def test_early_return_ends_only_those_who_take_it(leave: str):
    guard = "setp.gt.u32 %p0, %r0, 63;" if leave.endswith("uni") else "and.b32 %r2, %r0, 3; setp.eq.u32 %p0, %r2, 1;"
    found = run(f"{guard} @%p0 {leave}; mov.u32 %r1, 7;")
    gone = THREAD > 63 if leave.endswith("uni") else THREAD % 4 == 1
    np.testing.assert_array_equal(found, np.where(gone, 0, 7))


def test_lanes_meet_again_after_a_divergent_branch():
    body = """
        and.b32 %r2, %r0, 1; setp.eq.u32 %p0, %r2, 0; @%p0 bra EVEN;
        add.u32 %r3, %r0, 1; bra JOIN;
    EVEN:
        add.u32 %r3, %r0, 2;
    JOIN:
        activemask.b32 %r4; popc.b32 %r1, %r4;
    """
    np.testing.assert_array_equal(run(body), 32 + 0 * THREAD)


def test_divergence_is_counted():
    body = """
        mov.u32 %r0, %tid.x; and.b32 %r2, %r0, 1; setp.eq.u32 %p0, %r2, 0; @%p0 bra EVEN;
        add.u32 %r3, %r0, 1;
    EVEN:
        add.u32 %r3, %r0, 2;
    """
    launch = Emulator(90).launch(module(entry("kernel", ["u32 n"], body)), "kernel", 1, 32, [0])
    assert launch.statistics.divergent
    straight = Emulator(90).launch(module(entry("kernel", ["u32 n"], "mov.u32 %r0, 1;")), "kernel", 1, 32, [0])
    assert straight.statistics.divergent == 0


def test_a_block_need_not_fill_its_last_warp():
    np.testing.assert_array_equal(run("activemask.b32 %r2; popc.b32 %r1, %r2;", threads=37), [32] * 32 + [5] * 5)
