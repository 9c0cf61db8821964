"""Barriers of a block: all of it, part of it, arriving without waiting, reducing a predicate on the way."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_emulator import Emulator
from ptx_text import entry, module

SCHEDULES = [("round_robin", 0), ("reversed", 0), ("random", 1), ("random", 2)]
POOL = ".shared .align 16 .b8 pool[2048];"


def run(body: str, *, threads: int = 128, schedule: tuple[str, int] = ("round_robin", 0)) -> np.ndarray:
    """What each thread leaves in %r1; %r0 is its index, %r10 the address of its word in shared memory."""
    text = f"""
        mov.u32 %r0, %tid.x; mov.u32 %r1, 0; mov.u32 %r10, pool; mad.lo.u32 %r10, %r0, 4, %r10;
        {body}
        ld.param.u64 %x40, [target]; mul.wide.u32 %x41, %r0, 4; add.u64 %x40, %x40, %x41; st.global.u32 [%x40], %r1;
    """
    target = np.zeros(threads, np.uint32)
    emulator = Emulator(90, schedule=schedule[0], seed=schedule[1])
    emulator.launch(module(entry("kernel", ["u64 target"], text, registers=POOL)), "kernel", 1, threads, [target])
    return target


THREAD = np.arange(128)
WAITS = ["bar.sync 0", "bar.sync 3, 128", "barrier.sync 1", "barrier.sync.aligned 2, 128", "barrier.cta.sync 4"]
WAITS += ["bar.cta.sync 5", "barrier.cta.sync.aligned 6", "mov.u32 %r20, 7; barrier.sync %r20, %r21"]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("wait", WAITS)
def test_barrier_of_the_block_orders_shared_memory(wait: str, schedule: tuple[str, int]):
    body = f"""
        mov.u32 %r21, 128; add.u32 %r2, %r0, 500; st.shared.b32 [%r10], %r2;
        {wait};
        xor.b32 %r3, %r0, 64; mov.u32 %r4, pool; mad.lo.u32 %r4, %r3, 4, %r4;
        ld.shared.b32 %r1, [%r4];
    """
    np.testing.assert_array_equal(run(body, schedule=schedule), (THREAD ^ 64) + 500)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_two_halves_of_a_block_use_barriers_of_their_own(schedule: tuple[str, int]):
    body = """
        shr.u32 %r2, %r0, 6; add.u32 %r3, %r2, 1;
        st.shared.b32 [%r10], %r0;
        barrier.sync %r3, 64;
        xor.b32 %r4, %r0, 32; mov.u32 %r5, pool; mad.lo.u32 %r5, %r4, 4, %r5; ld.shared.b32 %r1, [%r5];
    """
    np.testing.assert_array_equal(run(body, schedule=schedule), THREAD ^ 32)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("arrive", ["bar.arrive", "barrier.arrive", "barrier.cta.arrive.aligned"])
def test_producer_arrives_without_waiting(arrive: str, schedule: tuple[str, int]):
    body = f"""
        mov.u32 %r5, pool; and.b32 %r6, %r0, 63; mad.lo.u32 %r5, %r6, 4, %r5;
        setp.lt.u32 %p0, %r0, 64; @!%p0 bra CONSUMER;
        add.u32 %r2, %r0, 7; st.shared.b32 [%r5], %r2;
        {arrive} 1, 128;
        mov.u32 %r1, 1; bra DONE;
    CONSUMER:
        bar.sync 1, 128;
        ld.shared.b32 %r1, [%r5];
    DONE:
    """
    np.testing.assert_array_equal(run(body, schedule=schedule), np.where(THREAD < 64, 1, THREAD - 64 + 7))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("form", ["bar.red", "barrier.red", "barrier.cta.red.aligned"])
@pytest.mark.parametrize("negated", ["", "!"])
@pytest.mark.parametrize("bound", [0, 37, 128])
def test_barrier_reduces_a_predicate(form: str, bound: int, negated: str, schedule: tuple[str, int]):
    body = f"""
        setp.lt.u32 %p0, %r0, {bound};
        {form}.popc.u32 %r2, 0, {negated}%p0;
        {form}.and.pred %p1, 0, {negated}%p0;
        {form}.or.pred %p2, 0, 128, {negated}%p0;
        selp.u32 %r3, 1000, 0, %p1; selp.u32 %r4, 10000, 0, %p2;
        add.u32 %r1, %r2, %r3; add.u32 %r1, %r1, %r4;
    """
    count = 128 - bound if negated else bound
    expected = count + 1000 * (count == 128) + 10000 * (count > 0)
    np.testing.assert_array_equal(run(body, schedule=schedule), expected)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_barrier_in_a_loop_separates_the_rounds(schedule: tuple[str, int]):
    body = """
        st.shared.b32 [%r10], %r0; mov.u32 %r2, 0;
        add.u32 %r3, %r0, 33; and.b32 %r3, %r3, 127; mov.u32 %r4, pool; mad.lo.u32 %r4, %r3, 4, %r4;
    ROUND:
        bar.sync 0; ld.shared.b32 %r1, [%r4];
        bar.sync 0; st.shared.b32 [%r10], %r1;
        add.u32 %r2, %r2, 1; setp.lt.u32 %p0, %r2, 5; @%p0 bra ROUND;
    """
    np.testing.assert_array_equal(run(body, schedule=schedule), (THREAD + 5 * 33) % 128)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_barrier_does_not_wait_for_threads_that_have_ended(schedule: tuple[str, int]):
    body = """
        setp.ge.u32 %p0, %r0, 64; @%p0 ret;
        st.shared.b32 [%r10], %r0; bar.sync 0;
        xor.b32 %r3, %r0, 32; mov.u32 %r4, pool; mad.lo.u32 %r4, %r3, 4, %r4; ld.shared.b32 %r1, [%r4];
    """
    np.testing.assert_array_equal(run(body, schedule=schedule), np.where(THREAD < 64, THREAD ^ 32, 0))


def test_barriers_are_counted():
    body = "bar.sync 0; bar.sync 0;"
    ptx = module(entry("kernel", ["u32 n"], body))
    assert Emulator(90).launch(ptx, "kernel", 3, 128, [0]).statistics.barriers == 2 * 3 * 4


FENCES = ["membar.cta", "membar.gl", "membar.sys", "fence.sc.gpu", "fence.acq_rel.cta", "fence.acq_rel.gpu"]
FENCES += ["fence.acq_rel.sys", "fence.proxy.async", "fence.proxy.async.shared::cta", "fence.proxy.alias"]


@pytest.mark.parametrize("fence", FENCES)
def test_fence_is_executed_and_changes_nothing(fence: str):
    np.testing.assert_array_equal(run(f"mov.u32 %r1, 3; {fence};"), 3 + 0 * THREAD)
