"""``tests/gpu/KERNELS.md``: one row for each kernel, the worst that the table has of it. Made from kernels.json alone;
`report` has all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gates.cases import OPERATORS
from gates.promises import Kernel, Operator, Problem
from gates.records import Key
from gates.report import BACKENDS, compilers, head, line, wide
from gates.roofline import bound_by
from gates.table import Table

PATH = Path(__file__).parents[1] / "KERNELS.md"
INTRODUCTION = """\
# What the GPU kernels take and move

One row for each kernel, with the worst that was found over backends, architectures, sizes and dtypes, and where.
`make gpu-report` prints all of it; `make gpu-table` measures it again and writes `kernels.json` and this page. Tests
fail where a kernel gets worse. **Nothing here was timed**: the machine code was read, and an emulator counted.

* **bound by**: what takes longest on an H100 at the size of a training batch, each at its full rate: the bytes that
  cannot be avoided, or the multiply-adds, on tensor cores or without them.
* **registers** per thread, of 255; **spills**: instructions that keep values in memory because registers ran out.
* **moved / compulsory**: the 32-byte sectors of global memory that the accesses touch, each time that they do, over the
  bytes that cannot be avoided: at the first of the measured sizes, which is usual, and at the worst one. Small odd rows
  leave sectors half empty, and products of tiles read their tiles again and again, which the caches catch.
* **instructions**: tensor cores, 16-byte loads and stores where sizes allow them, and atomics. Those on sm_100 only
  reserve tensor memory.
"""
COLUMNS = ("kernel", "bound by", "registers", "spills", "moved / compulsory", "at worst", "instructions")


def markdown(table: Table) -> str:
    """The whole page."""
    rows = [
        _row(operator, [kernel for kernel in operator.kernels if kernel.name == name], table)
        for operator in OPERATORS
        for name in dict.fromkeys(kernel.name for kernel in operator.kernels)
    ]
    return "\n".join([INTRODUCTION, *head(COLUMNS), *rows, "", compilers(table)])


def _row(operator: Operator, entries: list[Kernel], table: Table) -> str:
    """A kernel whose backends may have entries of their own."""
    name = entries[0].name
    compiled, traffic = (
        {key: row for key, row in rows.items() if (key.operator, key.kernel) == (operator.name, name)}
        for rows in (table.compiled, table.traffic)
    )
    usual = next(iter(traffic)).problem
    ratio = max(row["ratio"] for key, row in traffic.items() if key.problem == usual)
    return line(
        f"`{name}`",
        _bounds(operator, entries),
        _worst(compiled, "registers"),
        _worst(compiled, "spills"),
        f"{ratio:.2f} {usual}",
        _worst(traffic, "ratio", "{:.2f}"),
        _instructions(operator, entries, compiled),
    )


def _worst(rows: dict[Key, dict[str, Any]], column: str, form: str = "{}") -> str:
    """The largest value, and the first row that has it unless it is 0."""
    key = max(rows, key=lambda key: rows[key][column])
    value = form.format(rows[key][column])
    return f"{value} ({BACKENDS[key.backend]} sm_{key.arch}, {key.problem} {key.dtype})" if rows[key][column] else value


def _bounds(operator: Operator, entries: list[Kernel]) -> str:
    """At full size, or, if the kernel does not run there, at the first size at which it does."""

    def bounds(kernel: Kernel) -> str:
        found = []
        for dtype in operator.dtypes:
            problems = (Problem(sizes, dtype, 90) for sizes in (operator.full_size, *operator.problems.values()))
            found.append(bound_by(kernel, next(problem for problem in problems if kernel.runs(problem))))
        return " or ".join(dict.fromkeys(found))

    by_backend = {backend: bounds(kernel) for kernel in entries for backend in kernel.backends}
    if len(set(by_backend.values())) == 1:
        return next(iter(by_backend.values()))
    return ", ".join(f"{what} ({BACKENDS[backend]})" for backend, what in by_backend.items())


def _instructions(operator: Operator, entries: list[Kernel], compiled: dict[Key, dict[str, Any]]) -> str:
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
