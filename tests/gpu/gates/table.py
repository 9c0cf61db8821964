"""``tests/gpu/kernels.json``: what the kernels took and moved when the table was made. One row a line, so that a change
of one kernel is a change of a few lines; the meaning of the columns is in ``gates/records.py``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gates.records import Key

PATH = Path(__file__).parents[1] / "kernels.json"


@dataclass(frozen=True)
class Table:
    made_with: dict[str, str]
    """Backend -> its compilers."""
    compiled: dict[Key, dict[str, Any]]
    traffic: dict[Key, dict[str, Any]]


def load(path: Path = PATH) -> Table:
    """The checked-in table."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = {
        name: [dict(zip(content[f"{name}_columns"], row, strict=True)) for row in content[name]]
        for name in ("compiled", "traffic")
    }
    return Table(content["made_with"], _keyed(rows["compiled"]), _keyed(rows["traffic"]))


def save(table: Table, path: Path = PATH) -> None:
    parts = [f' "made_with": {json.dumps(table.made_with)}']
    for name, rows in (("compiled", table.compiled), ("traffic", table.traffic)):
        columns = list(next(iter(rows.values()), {}))
        lines = ",\n".join(f"  {json.dumps([row[column] for column in columns])}" for row in rows.values())
        parts.append(f' "{name}_columns": {json.dumps(columns)},\n "{name}": [\n{lines}\n ]')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def measured() -> Table:
    """The table as it would be made now; RuntimeError where a tool is missing."""
    from gates import measure

    for backend in measure.ARCHITECTURES:
        if reason := measure.missing(backend):
            raise RuntimeError(f"the table holds Triton and CUDA C++ kernels, but this {reason}")
    compiled = {
        key: row.fields()
        for backend, architectures in measure.ARCHITECTURES.items()
        for arch in architectures
        for key, row in measure.compiled(backend, arch).items()
    }
    traffic = {
        key: row.fields()
        for backend in measure.ARCHITECTURES
        for arch in measure.EXECUTED
        for key, row in measure.traffic(backend, arch).items()
    }
    return Table({backend: measure.compiler(backend) for backend in measure.ARCHITECTURES}, compiled, traffic)


def of(rows: Mapping[Key, Any], *, backend: str, arch: int) -> dict[Key, Any]:
    """The rows of one backend and architecture."""
    return {key: row for key, row in rows.items() if (key.backend, key.arch) == (backend, arch)}


def _keyed(rows: Iterable[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    return {Key(*(row[name] for name in Key._fields)): row for row in rows}
