"""cp.async: sizes, zero filling, and groups that are waited for in the order of their commits."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_emulator import Emulator
from ptx_text import entry, module

SCHEDULES = ["round_robin", "reversed", "random"]
THREADS = 64
POOL = ".shared .align 16 .b8 pool[8192];"
PARAMETERS = ["u64 source", "u64 target"]


def run(body: str, source: np.ndarray, target: np.ndarray, *, schedule: str = "round_robin"):
    """%x0 source, %x1 target, %r0 the thread, %r1 the address of 16 bytes of shared memory of its own."""
    text = f"""
        ld.param.u64 %x0, [source]; ld.param.u64 %x1, [target];
        mov.u32 %r0, %tid.x; mov.u32 %r1, pool; mad.lo.u32 %r1, %r0, 16, %r1;
        mul.wide.u32 %x2, %r0, 16; add.u64 %x0, %x0, %x2; add.u64 %x1, %x1, %x2;
        {body}
    """
    ptx = module(entry("kernel", PARAMETERS, text, registers=POOL))
    return Emulator(90, schedule=schedule, seed=1).launch(ptx, "kernel", 1, THREADS, [source, target])


def words(rows: int = THREADS) -> np.ndarray:
    room = np.zeros((rows + 1) * 16, np.uint8)
    aligned = room[-room.ctypes.data % 16 :][: rows * 16].view(np.uint32).reshape(rows, 4)
    aligned[:] = np.arange(rows * 4).reshape(rows, 4) + 1
    return aligned


def zeros() -> np.ndarray:
    array = words()
    array[:] = 0
    return array


COPIES = [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16), ("ca", "L2::128B"), ("cg", "L2::256B")]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("cache", "size"), COPIES, ids=str)
@pytest.mark.parametrize("wait", ["cp.async.commit_group; cp.async.wait_group 0;", "cp.async.wait_all;"])
def test_copy_arrives_with_the_wait(cache: str, size, wait: str, schedule: str):
    hint, size = (f".{size}", 16) if isinstance(size, str) else ("", size)
    body = f"""
        st.shared.v4.b32 [%r1], {{0, 0, 0, 0}};
        cp.async.{cache}.shared.global{hint} [%r1], [%x0], {size};
        {wait}
        ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r1]; st.global.v4.b32 [%x1], {{%r4, %r5, %r6, %r7}};
    """.replace("{0, 0, 0, 0}", "{%r20, %r20, %r20, %r20}").replace("st.shared", "mov.u32 %r20, 0; st.shared", 1)
    source, target = words(), zeros()
    launch = run(body, source, target, schedule=schedule)
    np.testing.assert_array_equal(target[:, : size // 4], source[:, : size // 4])
    assert not target[:, size // 4 :].any()
    assert launch.statistics.async_copy_bytes == size * THREADS
    assert THREADS * 16 / 32 <= launch.statistics.global_load_distinct_sectors <= THREADS * 16 / 32 + 1


@pytest.mark.parametrize("filled", [0, 4, 8, 16])
def test_what_lies_beyond_the_source_size_becomes_zero(filled: int):
    body = f"""
        mov.u32 %r3, {filled};
        cp.async.cg.shared.global [%r1], [%x0], 16, %r3; cp.async.wait_all;
        ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r1]; st.global.v4.b32 [%x1], {{%r4, %r5, %r6, %r7}};
    """
    source, target = words(), zeros()
    run(body, source, target)
    expected = source.copy()
    expected[:, filled // 4 :] = 0
    np.testing.assert_array_equal(target, expected)


def test_source_of_an_empty_copy_need_not_exist():
    body = """
        mov.u32 %r3, 0; mov.u64 %x5, 64;
        cp.async.cg.shared.global [%r1], [%x5], 16, %r3; cp.async.wait_all;
        ld.shared.b32 %r4, [%r1]; st.global.b32 [%x1], %r4;
    """
    target = words()
    run(body, words(), target)
    assert not target[:, 0].any()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_waiting_for_all_but_the_newest_group(schedule: str):
    """Two stages: the older group has arrived while the younger is still in flight."""
    body = """
        cp.async.ca.shared.global [%r1], [%x0], 4; cp.async.commit_group;
        cp.async.ca.shared.global [%r1+4], [%x0+4], 4; cp.async.ca.shared.global [%r1+8], [%x0+8], 4;
        cp.async.commit_group;
        cp.async.wait_group 1;
        ld.shared.b32 %r4, [%r1]; st.global.b32 [%x1], %r4;
        cp.async.wait_group 0;
        ld.shared.b32 %r4, [%r1+4]; ld.shared.b32 %r5, [%r1+8]; st.global.b32 [%x1+4], %r4; st.global.b32 [%x1+8], %r5;
    """
    source, target = words(), zeros()
    run(body, source, target, schedule=schedule)
    np.testing.assert_array_equal(target[:, :3], source[:, :3])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_copy_of_another_thread_is_visible_after_wait_and_barrier(schedule: str):
    body = """
        cp.async.cg.shared.global [%r1], [%x0], 16; cp.async.commit_group; cp.async.wait_group 0;
        bar.sync 0;
        xor.b32 %r2, %r0, 32; mov.u32 %r3, pool; mad.lo.u32 %r3, %r2, 16, %r3;
        ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3]; st.global.v4.b32 [%x1], {%r4, %r5, %r6, %r7};
    """
    source, target = words(), zeros()
    run(body, source, target, schedule=schedule)
    np.testing.assert_array_equal(target, source[np.arange(THREADS) ^ 32])


def test_waiting_for_groups_that_do_not_exist_does_not_block():
    source, target = words(), zeros()
    body = (
        "cp.async.wait_group 3; cp.async.commit_group; cp.async.wait_group 0; mov.u32 %r4, 5; st.global.b32 [%x1], %r4;"
    )
    run(body, source, target)
    assert (target[:, 0] == 5).all()
