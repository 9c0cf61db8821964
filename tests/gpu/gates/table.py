"""``tests/gpu/kernels.json``: what the kernels took and moved when the table was made. One row a line, so that a change
of one kernel is a change of a few lines; the meaning of the columns is in ``gates/records.py``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gates.budgets import BUDGETS
from gates.cases import OPERATORS
from gates.promises import Operator
from gates.records import Key, SlopeKey

PATH = Path(__file__).parents[1] / "kernels.json"
PARTS = ("compiled", "traffic", "slopes")
BACKENDS = ("triton", "cuda")


@dataclass(frozen=True)
class Table:
    made_with: dict[str, str]
    """Backend -> its compilers."""
    compiled: dict[Key, dict[str, Any]]
    traffic: dict[Key, dict[str, Any]]
    slopes: dict[SlopeKey, dict[str, Any]]


def load(path: Path = PATH) -> Table:
    """The checked-in table."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = {name: [dict(zip(content[f"{name}_columns"], row, strict=True)) for row in content[name]] for name in PARTS}
    slopes = {SlopeKey(row["backend"], row["unit"]): row for row in rows["slopes"]}
    return Table(content["made_with"], _keyed(rows["compiled"]), _keyed(rows["traffic"]), slopes)


def save(table: Table, path: Path = PATH) -> None:
    parts = [f' "made_with": {json.dumps(table.made_with)}']
    for name in PARTS:
        rows = getattr(table, name)
        columns = list(next(iter(rows.values()), {}))
        lines = ",\n".join(
            f"  {json.dumps([row[column] for column in columns], ensure_ascii=False)}" for row in rows.values()
        )
        parts.append(f' "{name}_columns": {json.dumps(columns)},\n "{name}": [\n{lines}\n ]')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def measured(operators: tuple[Operator, ...] = OPERATORS) -> Table:
    """The rows of ``operators`` as they would be made now.

    Raises:
        RuntimeError: a tool is missing.
    """
    from gates import measure, workers

    rows = workers.rows(operators)
    made_with = {backend: measure.compiler(backend) for backend in measure.ARCHITECTURES}
    return Table(made_with, _in_order(rows["compiled"]), _in_order(rows["traffic"]), _slopes_in_order(rows["slopes"]))


def launching(names: Iterable[str], operators: Iterable[Operator] = OPERATORS) -> tuple[Operator, ...]:
    """The operators that have one of these names, or a kernel that has.

    Raises:
        ValueError: nothing has one of the names.
    """
    names, operators = set(names), tuple(operators)
    named = {operator: {operator.name, *(kernel.name for kernel in operator.kernels)} for operator in operators}
    if unknown := names.difference(*named.values()):
        raise ValueError(f"no operator and no kernel is called {', '.join(sorted(unknown))}")
    return tuple(operator for operator in operators if named[operator] & names)


def replaced(recorded: Table, rows: Table, operators: Iterable[Operator]) -> Table:
    """``recorded`` with ``rows`` in the place of all that it has of these operators.

    Raises:
        ValueError: other compilers made the rows, so that they cannot stand in one table.
    """
    if rows.made_with != recorded.made_with:
        raise ValueError(
            f"the table was made with {recorded.made_with}, but here is {rows.made_with}: remake all of it"
        )
    names = {operator.name for operator in operators}

    def kept(rows: Mapping[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
        return {key: row for key, row in rows.items() if row["operator"] not in names}

    return Table(
        recorded.made_with,
        _in_order(kept(recorded.compiled) | rows.compiled),
        _in_order(kept(recorded.traffic) | rows.traffic),
        _slopes_in_order(kept(recorded.slopes) | rows.slopes),
    )


def _in_order(rows: Mapping[Key, dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    """By backend and architecture, then in the order of the entries; without operators that are no more."""
    entries = {operator.name: operator for operator in OPERATORS}
    order = list(entries)

    def place(key: Key) -> tuple[int, ...]:
        entry = entries[key.operator]
        within = (
            (key.problem, list(entry.problems)),
            (key.dtype, list(entry.dtypes)),
            (key.kernel, list(dict.fromkeys(kernel.name for kernel in entry.kernels))),
        )
        found = (values.index(value) if value in values else len(values) for value, values in within)
        return BACKENDS.index(key.backend), key.arch, order.index(key.operator), *found

    return {key: rows[key] for key in sorted((key for key in rows if key.operator in entries), key=place)}


def _slopes_in_order(rows: Mapping[SlopeKey, dict[str, Any]]) -> dict[SlopeKey, dict[str, Any]]:
    units = [budget.unit for budget in BUDGETS]
    places = {SlopeKey(backend, unit): None for unit in units for backend in BACKENDS}
    return {key: rows[key] for key in places if key in rows}


def of(
    rows: Mapping[Key, Any], *, backend: str, arch: int, operators: Iterable[Operator] = OPERATORS
) -> dict[Key, Any]:
    """The rows of one backend and architecture, and of these operators where not all are wanted."""
    names = None if operators is OPERATORS else {operator.name for operator in operators}
    return {
        key: row
        for key, row in rows.items()
        if (key.backend, key.arch) == (backend, arch) and (names is None or key.operator in names)
    }


def _keyed(rows: Iterable[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    return {Key(*(row[name] for name in Key._fields)): row for row in rows}
