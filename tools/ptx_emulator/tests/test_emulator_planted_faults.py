"""Every planted bug is reported as what it is, where it is, under every schedule; its repaired twin is not."""

from __future__ import annotations

import numpy as np
import planted_memory
import planted_races
import planted_waits
import planted_warpgroup
import pytest
from planted import Planted
from ptx_emulator import Buffer, Emulator, EmulatorError

PLANTED = planted_memory.MEMORY + planted_races.RACES + planted_waits.BARRIERS
PLANTED += planted_waits.COPIES + planted_warpgroup.WARPGROUP
SCHEDULES = [("round_robin", 0), ("reversed", 0), ("random", 1), ("random", 2), ("random", 3)]
BYTES = 256


def aligned() -> np.ndarray:
    room = np.zeros(BYTES + 256, np.uint8)
    return room[-room.ctypes.data % 256 :][:BYTES]


def launch(planted: Planted, *, wrong: bool, schedule: tuple[str, int]) -> None:
    emulator = Emulator(90, schedule=schedule[0], seed=schedule[1], instruction_limit=20_000)
    first, second = aligned(), aligned()
    buffers = None
    if planted.kind == "read_only":
        buffers = [
            Buffer(first.ctypes.data, BYTES, "output"),
            Buffer(second.ctypes.data, BYTES, "input", writable=False),
        ]
    text = planted.text(wrong)
    emulator.launch(text, "planted", planted.blocks, planted.threads, [first, second], buffers=buffers)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_bug_is_reported_as_what_it_is(planted: Planted, schedule: tuple[str, int]):
    with pytest.raises(EmulatorError) as caught:
        launch(planted, wrong=True, schedule=schedule)
    faults = [fault for fault in caught.value.faults if fault.kind == planted.kind]
    assert faults, f"reported as {caught.value}"
    assert all(fault.kernel == "planted" for fault in faults)
    assert all(fault.ptx_line in planted.blamed() for fault in faults), str(caught.value)
    assert planted.kind in str(caught.value)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_repaired_kernel_raises_no_alarm(planted: Planted, schedule: tuple[str, int]):
    launch(planted, wrong=False, schedule=schedule)


@pytest.mark.parametrize("planted", [p for p in PLANTED if p.where], ids=lambda planted: planted.name)
def test_report_names_the_place(planted: Planted):
    with pytest.raises(EmulatorError) as caught:
        launch(planted, wrong=True, schedule=("round_robin", 0))
    fault = next(fault for fault in caught.value.faults if fault.kind == planted.kind)
    assert {name: getattr(fault, name) for name in planted.where} == planted.where
    line = planted.text(wrong=True).splitlines()[fault.ptx_line - 1]
    assert fault.instruction.split()[0].lstrip("@%p0123456789") in line
    assert 0 <= fault.lane < 32


def test_report_names_the_line_of_the_source():
    body = """
        .loc 1 42 7
        add.u64 %x6, %x0, 512;
        .loc 1 43 3
        ld.global.u32 %r2, [%x6];
    """
    planted = Planted("source line", "out_of_bounds", body)
    text = planted.text(wrong=True) + '.file 1 "/home/user/kernels/sum.cu"\n'
    with pytest.raises(EmulatorError) as caught:
        Emulator(90).launch(text, "planted", 1, 1, [aligned(), aligned()])
    assert caught.value.faults[0].source == "sum.cu:43"
    assert "sum.cu:43" in str(caught.value)


def test_different_faults_are_all_reported_and_each_instruction_once():
    body = """
        ld.global.u32 %r2, [%x0+1024]; ld.shared.u32 %r3, [%r10]; st.global.u32 [%x5+4096], %r0;
    """
    text = Planted("three", "", body).text(wrong=True)
    with pytest.raises(EmulatorError) as caught:
        Emulator(90).launch(text, "planted", 4, 64, [aligned(), aligned()])
    kinds = [fault.kind for fault in caught.value.faults]
    assert sorted(kinds) == ["out_of_bounds", "out_of_bounds", "uninitialised"]
    with pytest.raises(EmulatorError) as caught:
        Emulator(90, max_faults=1).launch(text, "planted", 4, 64, [aligned(), aligned()])
    assert len(caught.value.faults) == 1


def test_checks_can_be_switched_off():
    race = next(p for p in planted_races.RACES if p.name == "write without a barrier after a read")
    Emulator(90, races=False).launch(race.text(wrong=True), "planted", 1, 64, [aligned(), aligned()])
    unwritten = next(p for p in planted_memory.MEMORY if p.kind == "uninitialised")
    Emulator(90, uninitialised=False).launch(unwritten.text(wrong=True), "planted", 1, 64, [aligned(), aligned()])
