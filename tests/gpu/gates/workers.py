"""All rows of the table, measured in as many processes as there are cores: one piece of work is one operator on one
architecture of one backend."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from emulated_cuda import cuda_library
from ptx_emulator.build import build_emulator

from gates import budgets, measure
from gates.promises import Operator

SLOPES = "slopes"


class Piece(NamedTuple):
    """What one process measures in one go."""

    kind: str  # ``compiled``, ``traffic`` or ``slopes``
    backend: str
    arch: int
    operators: tuple[str, ...]


def rows(operators: Iterable[Operator], processes: int | None = None) -> dict[str, dict[Any, dict[str, Any]]]:
    """What `measure` finds of these operators: kind -> key -> row.

    Raises:
        RuntimeError: a tool is missing.
    """
    for backend in measure.ARCHITECTURES:
        if reason := measure.missing(backend):
            raise RuntimeError(f"the table holds Triton and CUDA C++ kernels, but this {reason}")
    build()
    found: dict[str, dict[Any, dict[str, Any]]] = {kind: {} for kind in ("compiled", "traffic", SLOPES)}
    processes = processes or int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    with pool:
        work = [(piece.kind, pool.submit(measured, piece)) for piece in pieces(operators)]
        for kind, future in work:
            found[kind].update(future.result())
    return found


def build() -> None:
    """Compile what all processes need, on all cores: a process that found it missing would keep the others waiting."""
    build_emulator()
    assert cuda_library.OPERATORS.loaded
    for arch in measure.EXECUTED:
        cuda_library.OPERATORS.ptx(arch)
    for arch in measure.ARCHITECTURES["cuda"]:
        measure.binaries(arch)


def pieces(operators: Iterable[Operator]) -> Iterator[Piece]:
    """What takes longest comes first, so that no process is left with it at the end."""
    operators = tuple(operators)
    for backend in measure.ARCHITECTURES:
        for budget in budgets.of(operators):
            yield Piece(SLOPES, backend, budgets.ARCH, (budget.unit,))
    for kind, architectures in (
        ("traffic", dict.fromkeys(measure.ARCHITECTURES, measure.EXECUTED)),
        ("compiled", measure.ARCHITECTURES),
    ):
        for backend, wanted in architectures.items():
            yield from (Piece(kind, backend, arch, (operator.name,)) for operator in operators for arch in wanted)


def measured(piece: Piece) -> dict[Any, dict[str, Any]]:
    """The rows of a piece."""
    if piece.kind == SLOPES:
        wanted = [budget for budget in budgets.BUDGETS if budget.unit in piece.operators]
        found: dict[Any, Any] = measure.slopes(piece.backend, wanted)
    else:
        operators = tuple(operator for operator in measure.OPERATORS if operator.name in piece.operators)
        found = getattr(measure, piece.kind)(piece.backend, piece.arch, operators)
    return {key: row.fields() for key, row in found.items()}
