"""``tests/gpu/KERNELS.md``: one row for each kernel, the worst that the table has of it. Made from kernels.json alone;
`report` has all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gates.cases import OPERATORS
from gates.model import H200, kernel_times
from gates.promises import Kernel, Operator
from gates.records import Key
from gates.report import BACKENDS, NONE, budget_lines, compilers, head, line, wide
from gates.table import Table

PATH = Path(__file__).parents[1] / "KERNELS.md"
INTRODUCTION = """\
# What the GPU kernels take and move

One row for each kernel, with the worst that was found over backends, architectures, sizes and dtypes, and where.
`make gpu-report` prints all of it; `make gpu-table` measures it again and writes `kernels.json` and this page. Tests
fail where a kernel gets worse. **Nothing here was timed**: the machine code was read, and an emulator counted.

* **warp instructions** that the first of the measured sizes takes in bfloat16 for each unit of work, as the emulator
  executes the PTX for sm_90: first Triton, then CUDA C++.
* **bound by**: the resource that a *model* says is the slowest on an H200 at the size of a training batch
  (`gates/model.py`): issue slots, DRAM, L2, shared memory or tensor cores.
* **registers** per thread, of 255; **spills**: instructions that keep values in memory because registers ran out.
* **moved / compulsory**: the 32-byte sectors of global memory that the accesses touch, each time that they do, over the
  bytes that cannot be avoided: at the first of the measured sizes, which is usual, and at the worst one. Small odd rows
  leave sectors half empty, and products of tiles read their tiles again and again, which the caches catch.
* **uses**: tensor cores, 16-byte loads and stores where sizes allow them, and atomics. Those on sm_100 only
  reserve tensor memory.
"""
COLUMNS = (
    "kernel", "warp instructions", "per", "bound by", "registers", "spills", "moved / compulsory", "at worst", "uses",
)  # fmt: skip
BUDGETS = """
## What a unit of work may cost

Warp instructions that one unit more adds, in bfloat16 on the emulated sm_90, against what the better and the other
backend may take. A test holds each to its budget, or where that is missed, to what it takes now. **The time is by the
model, for an H200; no GPU has run it.**
"""


def markdown(table: Table) -> str:
    """The whole page."""
    rows = [
        _row(operator, [kernel for kernel in operator.kernels if kernel.name == name], table)
        for operator in OPERATORS
        for name in dict.fromkeys(kernel.name for kernel in operator.kernels)
    ]
    return "\n".join([INTRODUCTION, *head(COLUMNS), *rows, BUDGETS, *budget_lines(table), "", compilers(table)])


def _row(operator: Operator, entries: list[Kernel], table: Table) -> str:
    """A kernel whose backends may have entries of their own."""
    name = entries[0].name
    compiled, traffic = (
        {key: row for key, row in rows.items() if (key.operator, key.kernel) == (operator.name, name)}
        for rows in (table.compiled, table.traffic)
    )
    usual = next(iter(traffic)).problem
    ratio = max(row["ratio"] for key, row in traffic.items() if key.problem == usual)
    counted, bound = _counted(operator, traffic)
    return line(
        f"`{name}`",
        counted,
        operator.unit.name,
        bound,
        _worst(compiled, "registers"),
        _worst(compiled, "spills"),
        f"{ratio:.2f} {usual}",
        _worst(traffic, "ratio", "{:.2f}"),
        _uses(operator, entries, compiled),
    )


def _worst(rows: dict[Key, dict[str, Any]], column: str, form: str = "{}") -> str:
    """The largest value, and the first row that has it unless it is 0."""
    key = max(rows, key=lambda key: rows[key][column])
    value = form.format(rows[key][column])
    return f"{value} ({BACKENDS[key.backend]} sm_{key.arch}, {key.problem} {key.dtype})" if rows[key][column] else value


def _counted(operator: Operator, traffic: dict[Key, dict[str, Any]]) -> tuple[str, str]:
    """Instructions a unit, and what binds: of each backend, at the first size at which the kernel runs."""
    counted, bounds = [], []
    for backend in BACKENDS:
        rows = [
            row for key, row in traffic.items() if (key.backend, key.arch, key.dtype) == (backend, H200.arch, "bf16")
        ]
        counted.append(f"{rows[0]['instructions_per_unit']:,.0f}" if rows else NONE)
        bounds += [kernel_times(operator, rows[0], H200).bound] if rows else []
    return " / ".join(counted), " / ".join(dict.fromkeys(bounds))


def _uses(operator: Operator, entries: list[Kernel], compiled: dict[Key, dict[str, Any]]) -> str:
    found = []
    everywhere = _places(compiled, lambda row: True)
    if tensor_cores := _places(compiled, lambda row: row["tensor_cores"]):
        lacking = {place: None for place in everywhere if place not in tensor_cores}
        found.append("tensor cores" + (f" (not {_named(lacking, everywhere)})" if lacking else ""))
    kinds = [kind for kind in ("loads", "stores") if any(kind in wide(operator, kernel) for kernel in entries)]
    if kinds:
        found.append(f"16-byte {' and '.join(kinds)}")
    if atomics := _places(compiled, lambda row: row["atomics"]):
        found.append(f"atomics ({_named(atomics, everywhere)})")
    return ", ".join(found) or "–"


def _places(rows: dict[Key, dict[str, Any]], condition: Callable[[dict[str, Any]], Any]) -> dict[tuple[str, int], None]:
    """Backends and architectures with such a row, in order."""
    return {(key.backend, key.arch): None for key, row in rows.items() if condition(row)}


def _named(places: Iterable[tuple[str, int]], everywhere: Iterable[tuple[str, int]]) -> str:
    """A backend whose architectures are all there is named alone."""
    named = []
    for backend, title in BACKENDS.items():
        here, all_of_it = ([arch for name, arch in which if name == backend] for which in (places, everywhere))
        if here:
            named.append(" ".join([title, *(f"sm_{arch}" for arch in here if here != all_of_it)]))
    return ", ".join(named)
