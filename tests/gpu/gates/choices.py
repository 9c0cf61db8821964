"""What ``MLIP_KERNELS_CUDA_BACKEND=auto`` takes by the model: the rows of ``mlip_kernels/cuda_choices.json`` that no
measurement has replaced.

A backend costs what is longer: its kernels on the device (`model`), one after the other, or the host that launches
them. The choice changes only where another backend is `CLEARLY` faster, so that small changes of counts turn nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from gates.cases import OPERATORS
from gates.model import A100, GPU, H200, kernel_times
from gates.promises import DTYPES, Operator
from gates.records import WHOLE_OPERATOR
from gates.table import BACKENDS, Table
from mlip_kernels import _cuda_choices

MODELLED_ON: tuple[GPU, ...] = (A100, H200)
CLEARLY = 1.1
HOST = {"triton": (45e-6, 25e-6), "cuda": (10e-6, 3e-6)}
"""Seconds of the host for a call with one launch, and for each launch more: timed with stubbed launches."""
LONG = {short: str(dtype).removeprefix("torch.") for short, dtype in DTYPES.items()}


def write(table: Table) -> list[str]:
    """Bring the file up to date, and say what changed."""
    before = _cuda_choices.load()
    after = proposed(table, before, datetime.date.today().isoformat())
    _cuda_choices.PATH.write_text(_cuda_choices.text(after), encoding="utf-8")
    changed = [
        f"{arch} {operator}: {before.get(arch, {}).get(operator)} -> {row}"
        for arch, rows in after.items()
        for operator, row in rows.items()
        if before.get(arch, {}).get(operator) != row
    ]
    return [f"wrote {_cuda_choices.PATH}", *(changed or ["no choice changed"])]


def proposed(table: Table, before: _cuda_choices.Table, date: str) -> dict[str, dict[str, Any]]:
    """The choices with those rows made anew that are modelled, on the architectures of `MODELLED_ON`."""
    entries: dict[str, Operator] = {}
    for entry in OPERATORS:
        entries.setdefault(entry.name.partition(",")[0], entry)
    after = {arch: dict(rows) for arch, rows in before.items()}
    for gpu in MODELLED_ON:
        rows = after.setdefault(f"sm_{gpu.arch}", {})
        for name in rows.keys() - entries.keys() - {_cuda_choices.INHERITS}:
            del rows[name]
        for name, entry in entries.items():
            was = rows.get(name, {})
            if was.get("basis") == "measured":
                continue
            found = {LONG[dtype]: costs(table, entry, gpu, dtype) for dtype in entry.dtypes}
            now = {dtype: _best(by_backend, was.get(dtype)) for dtype, by_backend in found.items()}
            if any(was.get(dtype) != choice for dtype, choice in now.items()):
                rows[name] = {**now, "basis": "modelled", "date": date}
    return after


def costs(table: Table, entry: Operator, gpu: GPU, dtype: str) -> dict[str, float]:
    """Seconds, by backend."""
    found = {}
    for backend in BACKENDS:
        rows = _launches(table, entry, backend, gpu.arch, dtype)
        if rows:
            first, more = HOST[backend]
            device = sum(kernel_times(entry, row, gpu).total for row in rows)
            found[backend] = max(device, first + more * (len(rows) - 1))
    return found


def _launches(table: Table, entry: Operator, backend: str, arch: int, dtype: str) -> list[Mapping[str, Any]]:
    """Of the first problem."""
    problem = next(iter(entry.problems))
    wanted = (backend, entry.name, arch, problem, dtype)
    return [
        row
        for key, row in table.traffic.items()
        if (key.backend, key.operator, key.arch, key.problem, key.dtype) == wanted and key.kernel != WHOLE_OPERATOR
    ]


def _best(costs: Mapping[str, float], was: str | None) -> str:
    best = min(costs, key=costs.__getitem__)
    return was if was in costs and costs[was] <= CLEARLY * costs[best] else best
