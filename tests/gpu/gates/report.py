"""The whole table as Markdown: ``make gpu-report``. Made from kernels.json alone; `page` is the summary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gates import occupancy
from gates.budgets import BUDGETS, Budget, Seconds, by_backend
from gates.cases import OPERATORS
from gates.model import GPUS, Times, kernel_times
from gates.promises import Kernel, Operator, Problem
from gates.records import WHOLE_OPERATOR, Key
from gates.roofline import lower_bound
from gates.table import Table

BACKENDS = {"triton": "Triton", "cuda": "CUDA C++"}

INTRODUCTION = """\
# What the GPU kernels take and move

**Nothing here was timed.** The kernels were compiled for GPUs that were not there, their machine code was read, and
their PTX was executed by an emulator on the CPU, which counts. `make gpu-table` makes `kernels.json`, and so this text,
out of the kernels as launched (Triton) and as shipped (CUDA C++); the tests fail where a kernel gets worse than this.
Every range spans the dtypes and instances (aligned and odd sizes).

* **registers** per thread; **shared** memory in bytes per block; **occupancy**: the share of a multiprocessor's warps
  that can be resident at once; **spills**: instructions that keep values in memory because registers ran out.
* **tensor core**: whether multiply-adds run there; **16-byte**: what is moved 16 bytes at a time where sizes allow it.
* **moved / compulsory**: the 32-byte sectors of global memory that the accesses touch, over the bytes that cannot be
  avoided: each input read once, each result written once. What caches would catch counts as moved: this is what is
  asked of the caches, and products of tiles ask again and again. The first table of an operator shows the first problem
  that needs the kernel, the second table shows all.
* **distinct / compulsory**: each sector counts once in a launch for reading and once for writing, as where the L2 cache
  keeps what it has seen. No launch can move less between L2 and DRAM unless an earlier one left it in the cache; one
  whose sectors do not fit into L2 (40 MB on A100, 50 MB on H100) moves more, at most what is *moved*.
* **useful / executed**: multiply-adds that the result needs, over those that the tensor cores execute.
* **instructions** of PTX that warps execute for each unit of work; **a byte**: over the compulsory bytes (in the time
  of a byte from DRAM an H200 can issue 0.24, and does issue about half of that); **waves**: passes over shared memory;
  **barriers** at which a block waits; **resident**: blocks, of so many warps, on a multiprocessor at once; **machine
  code / PTX**: instructions in the text of either, far from 1 where ptxas unrolls or folds what was counted.
* **modelled**: by `gates/model.py`, for as many units as training has, each as large as in the first problem that needs
  the kernel; and what binds. *A model, not a time: no GPU gave it.*
* **lower bound, not a time**: compulsory bytes at 3.35 TB/s, or needed multiply-adds at the full rate, whichever takes
  longer (NVIDIA's data sheet of the H100 SXM), at full size. How much slower a kernel is, only a GPU can tell.
"""
COLUMNS = (
    "kernel", "backend", "arch", "registers", "spills", "shared", "occupancy", "tensor core", "16-byte",
    "moved / compulsory", "distinct / compulsory", "useful / executed", "H100: *lower bound, not a time*",
)  # fmt: skip
COUNTS = (
    "counted", "backend", "arch", "dtype", "instructions", "a byte", "waves", "barriers", "resident",
    "machine code / PTX", *(f"{gpu.name}, *modelled*" for gpu in GPUS),
)  # fmt: skip
BUDGET = (
    "unit", "Triton", "CUDA C++", "better: at most", "other: at most", "met",
    "Triton, *modelled*", "CUDA C++, *modelled*", "for so many",
)  # fmt: skip
NONE = "–"


def markdown(table: Table) -> str:
    """The whole text."""
    sections = (_section(operator, table) for operator in OPERATORS)
    parts = [INTRODUCTION, "## Budgets\n", *budget_lines(table), "", *sections, compilers(table)]
    return "\n".join(parts)


def budget_lines(table: Table) -> list[str]:
    """A table of all budgets: warp instructions that a unit of work adds, limits, and times by the model."""
    return [*head(BUDGET), *(budget_line(budget, by_backend(table.slopes, budget)) for budget in BUDGETS)]


def budget_line(budget: Budget, slopes: Mapping[str, Mapping[str, Any]]) -> str:
    taken = [f"{slopes[backend]['instructions']:,.0f}" if backend in slopes else NONE for backend in BACKENDS]
    modelled = [_modelled(budget.times(slopes[backend])) if backend in slopes else NONE for backend in BACKENDS]
    if isinstance(budget.limit, Seconds):
        limits = (f"{duration(budget.limit.seconds)}, as {budget.limit.of}", NONE)
    else:
        limits = (f"{budget.limit.better:,}", f"{budget.limit.other:,}")
    met = NONE if not slopes else "yes" if budget.kept(slopes) else "**no**"
    return line(budget.unit, *taken, *limits, met, *modelled, f"{budget.amount:,}")


def _modelled(times: Times) -> str:
    return f"{duration(times.total)}, {times.bound}"


def duration(seconds: float) -> str:
    """With two digits: ``1.5 ms`` or ``37 µs``."""
    value, unit = (seconds * 1e3, "ms") if seconds >= 1e-3 else (seconds * 1e6, "µs")
    return f"{float(f'{value:.2g}'):g} {unit}"


def compilers(table: Table) -> str:
    """The line that says what compiled the kernels."""
    versions = "; ".join(f"{BACKENDS[backend]} kernels by {compiler}" for backend, compiler in table.made_with.items())
    return f"Compiled: {versions}.\n"


def _section(operator: Operator, table: Table) -> str:
    sizes = [f"* *{name}*: {_sizes(sizes)}" for name, sizes in operator.problems.items()]
    lines = [f"## `{operator.name}`\n", *sizes, f"* full size: {_sizes(operator.full_size)}\n", *head(COLUMNS)]
    for kernel in operator.kernels:
        for backend in kernel.backends:
            compiled = _rows(table.compiled, operator, kernel.name, backend)
            for arch in dict.fromkeys(row["arch"] for row in compiled):
                moved = [row for row in _rows(table.traffic, operator, kernel.name, backend) if row["arch"] == arch]
                lines.append(_resources(operator, kernel, backend, arch, compiled, moved))
    lines += [
        "",
        *head(["moved / compulsory", "backend", *operator.problems, "passes over shared memory per load, store"]),
    ]
    for name in (*(kernel.name for kernel in operator.kernels), WHOLE_OPERATOR):
        for backend in BACKENDS:
            lines += _movement(operator, name, backend, _rows(table.traffic, operator, name, backend))
    lines += ["", f"Counted for each {operator.unit.name}:\n", *head(COUNTS)]
    for name in dict.fromkeys(kernel.name for kernel in operator.kernels):
        for backend in BACKENDS:
            lines += _counts(operator, _rows(table.traffic, operator, name, backend))
    return "\n".join([*lines, ""])


def _resources(
    operator: Operator, kernel: Kernel, backend: str, arch: int, compiled: list[dict], traffic: list[dict]
) -> str:
    rows = [row for row in compiled if row["arch"] == arch]
    moved = [row for row in traffic if row["problem"] == traffic[0]["problem"]]
    return line(
        f"`{kernel.name}`",
        BACKENDS[backend],
        f"sm_{arch}",
        _span(row["registers"] for row in rows),
        _span(row["spills"] for row in rows),
        _span(row["shared"] for row in rows),
        _span((100 * occupancy.occupancy(arch, row["threads"], row["blocks"]) for row in rows), "{:.0f}", " %"),
        "yes" if any(row["tensor_cores"] for row in rows) else "no",
        wide(operator, kernel),
        _span((row["ratio"] for row in moved), "{:.2f}"),
        _span((row["distinct_ratio"] for row in moved), "{:.2f}"),
        _span((100 * row["macs"] / row["macs_executed"] for row in moved if row["macs_executed"]), "{:.0f}", " %"),
        _bounds(operator, kernel) if arch == 90 else NONE,
    )


def _movement(operator: Operator, name: str, backend: str, rows: list[dict]) -> list[str]:
    if not rows:
        return []
    ratios = [
        _span((row["ratio"] for row in rows if row["problem"] == problem), "{:.2f}") for problem in operator.problems
    ]
    waves = [_span((row[waves] for row in rows if row[waves]), "{:.1f}") for waves in ("load_waves", "store_waves")]
    title = "the whole operator" if name == WHOLE_OPERATOR else f"`{name}`"
    return [line(title, BACKENDS[backend], *ratios, ", ".join(waves))]


def _counts(operator: Operator, rows: list[dict]) -> list[str]:
    """Of the first problem that needs the kernel."""
    return [
        line(
            f"`{row['kernel']}`",
            BACKENDS[row["backend"]],
            f"sm_{row['arch']}",
            row["dtype"],
            f"{row['instructions_per_unit']:,.0f}",
            f"{row['instructions_per_byte']:.2f}",
            f"{row['waves'] / row['units']:,.0f}",
            f"{row['barriers'] / row['units']:,.1f}",
            f"{row['resident']} of {row['warps']}",
            f"{row['machine']} / {row['ptx']}",
            *(_modelled(kernel_times(operator, row, gpu)) if gpu.arch == row["arch"] else NONE for gpu in GPUS),
        )
        for row in rows
        if row["problem"] == rows[0]["problem"]
    ]


def _rows(rows: Mapping[Key, dict[str, Any]], operator: Operator, kernel: str, backend: str) -> list[dict[str, Any]]:
    wanted = (backend, operator.name, kernel)
    return [row for key, row in rows.items() if (key.backend, key.operator, key.kernel) == wanted]


def wide(operator: Operator, kernel: Kernel) -> str:
    """What is moved 16 bytes at a time at some size: ``loads``, ``stores``, both or ``no``."""

    def anywhere(condition: Callable[[Problem], bool]) -> bool:
        return any(condition(Problem(sizes, t)) for sizes in operator.problems.values() for t in operator.dtypes)

    kinds = {"loads": kernel.wide_loads, "stores": kernel.wide_stores}
    return ", ".join(kind for kind, condition in kinds.items() if anywhere(condition)) or "no"


def _bounds(operator: Operator, kernel: Kernel) -> str:
    problems = [Problem(operator.full_size, dtype, 90) for dtype in operator.dtypes]
    bounds = [lower_bound(kernel, problem) * 1e6 for problem in problems if kernel.runs(problem)]
    return "≥ " + _span(bounds, "{:.1f}", " µs") if bounds else "does not run at this size"


def _span(values: Iterable[float], form: str = "{}", unit: str = "") -> str:
    """Smallest and largest value; one number if they print alike."""
    values = sorted(values)
    ends = list(dict.fromkeys(form.format(value) for value in (values[:1] + values[-1:])))
    return " to ".join(ends) + unit if ends else NONE


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sizes.items())


def head(columns: Iterable[str]) -> list[str]:
    """The two lines that begin a table."""
    columns = list(columns)
    return [line(*columns), "|" + "---|" * len(columns)]


def line(*cells: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"
