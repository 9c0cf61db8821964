"""Compares what was measured with what the kernels promise and with what the table has. Every function returns
complaints, one line each; none means that all is well.

Promises hold with any compiler: nothing spills, tensor cores, atomics and 16-byte accesses are used
where the kernel says so, and no kernel touches much more memory than it must.

What the table has is worth comparing with where the compilers are those that it was made with. Registers and shared
memory may grow as long as as many blocks fit on a multiprocessor as before, which is what they cost. Instructions,
traffic, bank conflicts, barriers and executed multiply-adds may not grow by more than 1 %. What one more unit of work
adds may not grow beyond its budget, or beyond what it adds already where that is more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gates.budgets import Budget, by_backend
from gates.promises import Kernel, Operator, Problem
from gates.records import SECTOR, WHOLE_OPERATOR, Compiled, Key, Slope, SlopeKey, Traffic

ALLOWED = 1.01
DISTINCT = 1.3  # bytes of the sectors that a kernel touches, over its compulsory bytes
REGENERATE = "If this is meant, record it with `make gpu-table` and say why in the commit."


def promises(measured: Iterable[Compiled], operators: Iterable[Operator]) -> list[str]:
    """Whether the machine code is what the kernels say that it is."""
    entries = {operator.name: operator for operator in operators}
    found = []
    for row in measured:
        entry = entries[row.operator]
        problem = Problem(entry.problems[row.problem], row.dtype, row.arch)
        found += size(row) + spills(row) + instructions(row, entry.kernel(row.kernel, row.backend), problem)
    return found


def size(row: Compiled) -> list[str]:
    """Whether a GPU could launch the kernel at all."""
    if row.blocks:
        return []
    return [
        f"{row.key}: not even one block fits on a multiprocessor: {row.threads} threads of {row.registers} registers,"
        f" {row.shared} bytes of shared memory"
    ]


def spills(row: Compiled) -> list[str]:
    """Whether a kernel keeps values in memory because it has more of them than registers."""
    if not row.spills and not row.stack:
        return []
    return [f"{row.key}: spills: {row.spills} instructions on local memory, {row.stack} bytes of stack per thread"]


def instructions(row: Compiled, kernel: Kernel, problem: Problem) -> list[str]:
    """Whether the machine code has the instructions that the kernel says it has, and no others."""
    found = []
    if kernel.tensor_cores(problem) and not row.tensor_cores:
        found.append(f"{row.key}: says that it uses tensor cores, but has no such instruction")
    if row.tensor_cores and not kernel.tensor_cores(problem):
        found.append(f"{row.key}: uses tensor cores without saying so; in float32 that is TF32")
    if row.atomics and not kernel.atomics(problem):
        found.append(f"{row.key}: uses atomic instructions without saying so")
    if kernel.wide_loads(problem) and row.widest_load < 16:
        found.append(f"{row.key}: says that it loads 16 bytes at a time, but the widest load has {row.widest_load}")
    if kernel.wide_stores(problem) and row.widest_store < 16:
        found.append(f"{row.key}: says that it stores 16 bytes at a time, but the widest store has {row.widest_store}")
    return found


def against_table(
    measured: Mapping[Key, Compiled] | Mapping[Key, Traffic], recorded: Mapping[Key, Mapping[str, Any]]
) -> list[str]:
    """Whether the table has exactly these rows, and none got worse than it says."""
    found = [f"{key}: is not in the table" for key in measured if key not in recorded]
    found += [f"{key}: is in the table, but no case launches it now" for key in recorded if key not in measured]
    for key in measured.keys() & recorded.keys():
        row = measured[key]
        found += (resources if isinstance(row, Compiled) else movement)(row, recorded[key])
    return sorted(found)


def resources(row: Compiled, recorded: Mapping[str, Any]) -> list[str]:
    """What a kernel takes of a multiprocessor."""
    if row.threads != recorded["threads"]:
        return [f"{row.key}: {row.threads} threads per block instead of {recorded['threads']}, so its budgets are void"]
    return [
        f"{row.key}: {name} grew from {recorded[name]} to {getattr(row, name)}; only up to {recorded[budget]} do"
        f" {recorded['blocks']} blocks fit on a multiprocessor, now {row.blocks} do"
        for name, budget in (("registers", "register_budget"), ("shared", "shared_budget"))
        if getattr(row, name) > recorded[budget]
    ]


def movement(row: Traffic, recorded: Mapping[str, Any]) -> list[str]:
    """What an executed kernel moves and computes; of a whole operator, only what it moves."""
    found = necessities(row)
    if row.ratio > ALLOWED * recorded["ratio"]:
        found.append(
            f"{row.key}: moved / compulsory bytes grew from {recorded['ratio']:.3f} to {row.ratio:.3f}"
            f" ({recorded['moved']} / {recorded['compulsory']} to {row.moved} / {row.compulsory})"
        )
    if row.distinct > ALLOWED * recorded["distinct"]:
        found.append(f"{row.key}: distinct bytes grew from {recorded['distinct']} to {row.distinct}")
    if row.kernel == WHOLE_OPERATOR:
        return found
    if ALLOWED * row.wide_share < recorded["wide_share"]:
        found.append(
            f"{row.key}: the share of bytes moved 16 at a time fell from {recorded['wide_share']} to {row.wide_share}"
        )
    for name, what in (("load_waves", "load"), ("store_waves", "store")):
        if getattr(row, name) > ALLOWED * max(1.0, recorded[name]):  # one pass is no conflict
            found.append(
                f"{row.key}: passes over shared memory per {what} grew from {recorded[name]} to {getattr(row, name)}:"
                " bank conflicts"
            )
    if row.macs_executed > ALLOWED * recorded["macs_executed"]:
        found.append(
            f"{row.key}: multiply-adds on tensor cores grew from {recorded['macs_executed']} to {row.macs_executed},"
            f" of which {row.macs} are needed"
        )
    found += [
        f"{row.key}: {what} grew from {recorded[name]} to {getattr(row, name)}"
        for name, what in (
            ("instructions", "instructions of warps"),
            ("waves", "passes over shared memory"),
            ("barriers", "barriers of blocks"),
        )
        if getattr(row, name) > ALLOWED * recorded[name]
    ]
    return found


def slopes(
    backend: str,
    measured: Mapping[SlopeKey, Slope],
    recorded: Mapping[SlopeKey, Mapping[str, Any]],
    budgets: Iterable[Budget],
) -> list[str]:
    """Whether a unit of work takes more instructions on a backend than it may."""
    found = []
    for budget in budgets:
        key, rows = SlopeKey(backend, budget.unit), by_backend(recorded, budget)
        row = measured.get(key)
        if row is None:
            found += [f"{key}: is in the table, but launches nothing now"] if backend in rows else []
        elif backend not in rows:
            found.append(f"{key}: is not in the table")
        elif row.instructions > ALLOWED * (allowed := budget.allowed(backend, rows)):
            was = rows[backend]["instructions"]
            found.append(
                f"{key}: takes {row.instructions:,.0f} instructions, was {was:,.0f}; {allowed:,.0f} are allowed"
            )
    return found


def necessities(row: Traffic) -> list[str]:
    """Whether a kernel touches and computes what its formulas call necessary: if less, then the formulas are wrong; if
    much more memory, then the kernel is. What kernels hand to each other is in no formula of a whole operator."""
    found = []
    if row.distinct < row.compulsory:
        found.append(f"{row.key}: touches {row.distinct} bytes, but its formula calls {row.compulsory} compulsory")
    if row.kernel != WHOLE_OPERATOR and row.distinct > distinct_limit(row):
        found.append(
            f"{row.key}: touches {row.distinct} bytes, {row.distinct_ratio:.2f} times the {row.compulsory} that are"
            f" compulsory; {distinct_limit(row)} are allowed"
        )
    if row.macs_executed < row.macs:
        found.append(
            f"{row.key}: executes {row.macs_executed} multiply-adds on tensor cores, but {row.macs} are needed"
        )
    return found


def distinct_limit(row: Traffic) -> int:
    """`DISTINCT` times what is compulsory, and for each buffer a sector of which it fills only a part: that is all that
    a few numbers take."""
    return int(DISTINCT * row.compulsory) + SECTOR * row.buffers
