"""What ``MLIP_KERNELS_CUDA_BACKEND=auto`` takes: ``cuda_choices.json``, a choice by architecture, operator and dtype.

A row says for each dtype ``triton``, ``cuda`` (CUDA C++) or ``plain`` (the definition in PyTorch), what that is based
on and since when: ``modelled`` on counts of an emulator (``tests/gpu/gates/model.py``) or ``measured`` on a GPU
(``make gpu-check``). An architecture without a row takes that of the one that it inherits from; one that the table does
not name is treated as the nearest below it, or as the lowest.

Only the standard library is imported: `mlip_kernels.env` has to work without torch.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("cuda_choices.json")
CHOICES = ("triton", "cuda", "plain")
DTYPES = ("float32", "float16", "bfloat16")
BASES = ("modelled", "measured")
INHERITS = "inherits"

Row = Mapping[str, str]
"""Dtype -> choice, and ``basis`` and ``date``."""
Table = Mapping[str, Mapping[str, Any]]
"""Architecture -> operator -> row; under `INHERITS` the architecture that has the other rows."""


@functools.cache
def load() -> Table:
    """The table of this package."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def text(table: Table) -> str:
    """A table as the file has it: one row a line."""

    def block(rows: Mapping[str, Any]) -> str:
        inherits, operators = rows.get(INHERITS), sorted(rows.keys() - {INHERITS})
        lines = [*([INHERITS] if inherits else []), *operators]
        return "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in lines) + "\n }"

    return "{\n" + ",\n".join(f" {json.dumps(name)}: {block(rows)}" for name, rows in table.items()) + "\n}\n"


def row(operator: str, arch: int, table: Table | None = None) -> Row | None:
    """The row of an operator on an architecture such as 90, None where the table does not have the operator."""
    table = load() if table is None else table
    name: str | None = _nearest(arch, table)
    while name is not None:
        rows = table[name]
        if operator in rows:
            return rows[operator]
        name = rows.get(INHERITS)
    return None


def choice(operator: str, dtype: str, arch: int, table: Table | None = None) -> str | None:
    """``triton``, ``cuda`` or ``plain``; None where the table does not have the operator."""
    found = row(operator, arch, table)
    return None if found is None else found[dtype]


def _nearest(arch: int, table: Table) -> str:
    named = sorted(int(name.removeprefix("sm_")) for name in table)
    return f"sm_{max((known for known in named if known <= arch), default=named[0])}"


def summary(arch: int | None = None) -> str:
    """How many operators run on what, on one architecture or on all that have rows, and what that is based on."""
    table = load()
    operators = {operator for rows in table.values() for operator in rows} - {INHERITS}
    wanted = [name for name in table if operators & table[name].keys()] if arch is None else [_nearest(arch, table)]
    said = []
    for name in wanted:
        rows = [found for operator in operators if (found := row(operator, int(name.removeprefix("sm_"))))]
        used = Counter("/".join(dict.fromkeys(found[dtype] for dtype in DTYPES)) for found in rows)
        counted = ", ".join(f"{count} on {choice}" for choice, count in sorted(used.items()))
        bases = " and ".join(sorted({f"{found['basis']} {found['date']}" for found in rows}))
        said.append(f"{name}: {counted} ({bases})")
    return "; ".join(said)
