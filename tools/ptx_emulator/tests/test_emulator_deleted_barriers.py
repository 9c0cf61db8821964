"""Delete each synchronisation of known kernels in turn: the emulator must notice, or the table must say why not.

A deletion is noticed if, under one of the schedules, a check reports it or the result changes. The survivors were read
one by one in the PTX: the tables give the reason why the kernel needs none of them.
"""

from __future__ import annotations

import importlib.util
import re

import known_kernels_runs as known
import pytest
import torch
from ptx_emulator import Emulator, EmulatorError
from tolerances import assert_close

SYNCHRONISES = re.compile(r"^\s*(@!?%\w+\s+)?((bar|barrier)\.|cp\.async\.(wait|commit)|wgmma\.(fence|commit|wait))")
SCHEDULES = [("round_robin", 0), ("reversed", 0), ("random", 1), ("random", 2)]
ARCHITECTURES = [80, 90]
TRITON = "3.8"

# kernel: {ordinal of the synchronisation in the kernel, from 1: (how it begins, why nothing is lost without it)}
SAME_GROUP = "joins the copies of the first tiles of A and B into one group, for which the same waits suffice"
NOTHING_BEFORE = "nothing in shared memory was touched before but the first stage, and copies to the second follow"
JUST_WAITED = "the same wait stands before the loop and at the end of its body, and no copy is issued between"
JUST_MET = "the same barrier stands before the loop and at the end of its body, and nothing is stored between"
TWIN = "two equal waits follow each other"
SAME_MAXIMA = "stores the maxima that the words hold already: the argmax before left them there"
THROUGH_SHUFFLE = (
    "a word is overwritten only by the two lanes whose shuffle its reader took part in, so the read is over; "
    "both store one value"
)

CUDA = ("softmax", "matmul", "row_maxima", "matmul_bf16")  # no survivors
TRITON_SURVIVORS: dict[tuple[str, int], dict[int, tuple[str, str]]] = {
    ("softmax", 80): {},
    ("softmax", 90): {},
    ("matmul", 80): {
        1: ("cp.async.commit_group", SAME_GROUP),
        3: ("bar.sync", NOTHING_BEFORE),
        8: ("cp.async.wait_group", JUST_WAITED),
        9: ("bar.sync", JUST_MET),
        13: ("cp.async.wait_group", TWIN),
        14: ("cp.async.wait_group", TWIN),
    },
    ("matmul", 90): {1: ("cp.async.commit_group", SAME_GROUP), 3: ("bar.sync", NOTHING_BEFORE)},
    **{("argmax_count", a): {3: ("bar.sync", SAME_MAXIMA), 4: ("bar.sync", SAME_MAXIMA)} for a in ARCHITECTURES},
    **{("scan_sort", a): dict.fromkeys((4, 8, 12), ("bar.sync", THROUGH_SHUFFLE)) for a in ARCHITECTURES},
}


def lines_of_kernel(text: str, name: str) -> range:
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if re.search(rf"\.entry\s+{name}\b", line))
    return range(first, next(n for n in range(first, len(lines)) if lines[n].startswith("}")))


def synchronisations(text: str, name: str) -> list[int]:
    """The lines that synchronise."""
    lines = text.splitlines()
    return [n for n in lines_of_kernel(text, name) if SYNCHRONISES.match(lines[n])]


def without(text: str, line: int) -> str:
    lines = text.splitlines()
    lines[line] = "// deleted"
    return "\n".join(lines)


def emulators(arch: int) -> list[Emulator]:
    return [Emulator(arch, schedule=name, seed=seed, instruction_limit=1_000_000) for name, seed in SCHEDULES]


def is_noticed(kernel: known.Known, text: str, arch: int, right: list[list[torch.Tensor]]) -> bool:
    for emulator, wanted in zip(emulators(arch), right, strict=True):
        try:
            found = kernel.run(text, emulator)
        except EmulatorError:
            return True
        if any(not torch.equal(x.nan_to_num(7.5), y.nan_to_num(7.5)) for x, y in zip(found, wanted, strict=True)):
            return True
    return False


def check(kernel: known.Known, arch: int, survivors: dict[int, tuple[str, str]]) -> None:
    right = [kernel.run(kernel.text, emulator) for emulator in emulators(arch)]
    for results in right:
        for result, truth in zip(results, kernel.truth, strict=True):
            assert_close(result, truth, name=kernel.name)
    places = synchronisations(kernel.text, kernel.name)
    assert places
    lines = kernel.text.splitlines()
    surviving = {
        number: lines[line].strip()
        for number, line in enumerate(places, 1)
        if not is_noticed(kernel, without(kernel.text, line), arch, right)
    }
    for number, (begins, reason) in survivors.items():
        assert number in surviving, f"no longer survives, {reason!r} is wrong: {lines[places[number - 1]].strip()}"
        assert surviving[number].startswith(begins)
    unexplained = {number: text for number, text in surviving.items() if number not in survivors}
    assert not unexplained, f"{kernel.name}, sm_{arch}: deleted without notice: {unexplained}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", CUDA)
def test_every_deleted_synchronisation_of_a_cuda_kernel_is_noticed(name: str, arch: int):
    check(known.cuda(name, arch), arch, {})


@pytest.mark.parametrize(("name", "arch"), TRITON_SURVIVORS)
def test_every_deleted_synchronisation_of_a_triton_kernel_is_noticed(name: str, arch: int):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    import triton

    if not triton.__version__.startswith(TRITON + "."):
        pytest.skip(f"needs Triton {TRITON}, in whose code the survivors were read, not {triton.__version__}")
    check(known.triton(name, arch), arch, TRITON_SURVIVORS[name, arch])
