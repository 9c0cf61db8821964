"""Measures the kernels that the cases launch: their machine code, and what they do when emulated."""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import runpy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from emulated_cuda import EmulatedCuda, cuda_library
from ptx_emulator.build import BuildError, build_emulator

import mlip_kernels
from gates import cubin, names
from gates.cases import OPERATORS
from gates.promises import Operator, Problem
from gates.records import SECTOR, WHOLE_OPERATOR, Compiled, Key, Traffic

LIBRARY = Path(mlip_kernels.__file__).with_name("_cuda.so")
BUILD = runpy.run_path(str(Path(__file__).parents[3] / "_build" / "compilers.py"))
ARCHITECTURES = {
    "triton": (80, 90, 100, 120),
    "cuda": tuple(int(name.removesuffix("+PTX").replace(".", "")) for name in BUILD["ARCHITECTURES"]),
}
"""What kernels are compiled for: every generation with Triton, and what the build makes by default."""
EXECUTED = (80, 90)
"""Architectures whose PTX the emulator executes."""


class Run(NamedTuple):
    """One call of an operator on one problem, and the launches that it made."""

    operator: Operator
    name: str  # of the problem
    problem: Problem
    launches: list[Any]


def missing(backend: str, *, execute: bool = False) -> str | None:
    """What is needed to compile (and execute) the kernels of ``backend`` and is not there; None if all is."""
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "needs Triton: pip install triton"
    if backend == "cuda" and not LIBRARY.exists():
        return "needs the CUDA part, mlip_kernels/_cuda.so: install the CUDA toolkit with nvcc, then this package again"
    if backend == "cuda" and (reason := cuda_library.missing()):
        return reason
    if execute and (reason := _emulator_missing()):
        return reason
    return cubin.REMEDY if cubin.cuobjdump() is None else None


@functools.cache
def _emulator_missing() -> str | None:
    try:
        build_emulator()
    except BuildError as failure:
        if str(failure).startswith("needs"):
            return str(failure)
        raise
    return None


@functools.cache
def shipped() -> dict[tuple[int, str], cubin.MachineCode]:
    """Every CUDA C++ kernel in the built library: (architecture, readable name) -> its code."""
    return {(arch, names.readable(name)): code for (arch, name), code in cubin.read(LIBRARY.read_bytes()).items()}


@functools.cache
def compiled(backend: str, arch: int, operators: tuple[Operator, ...] = OPERATORS) -> dict[Key, Compiled]:
    """Every instance of every kernel that the cases launch, compiled for ``arch``."""
    launched = arch if backend == "triton" else EXECUTED[0]  # the PTX of which is not looked at
    return compiled_rows(_runs(operators, backend, launched, execute=False, sized_as=arch), backend, arch)


@functools.cache
def traffic(backend: str, arch: int, operators: tuple[Operator, ...] = OPERATORS) -> dict[Key, Traffic]:
    """What every kernel moves when the emulator runs the cases, and every operator as a whole."""
    return traffic_rows(_runs(operators, backend, arch, execute=True), backend, arch)


def compiled_rows(runs: Iterable[Run], backend: str, arch: int) -> dict[Key, Compiled]:
    """What was launched, compiled for ``arch``; each instance once.

    An instance is what the compiler was asked for: of Triton a specialisation, of CUDA C++ the template arguments. What
    came out cannot tell them apart: cubins hold the path of the source, so whether those of two specialisations are the
    same bytes depends on the folders from which Triton's cache was filled.
    """
    rows: dict[Key, Compiled] = {}
    seen: set[Any] = set()
    launches = [(run, launch) for run in runs for launch in run.launches]
    if backend == "triton":
        cubin.read_kernels((launch.cubin for _, launch in launches), arch)
    for call, launch in launches:
        instance = names.readable(launch.kernel)
        threads = math.prod(launch.block)
        asked_for = launch.metadata["hash"] if backend == "triton" else instance
        same = (asked_for, threads, launch.shared)
        if same in seen:
            continue
        seen.add(same)
        code = shipped()[arch, instance] if backend == "cuda" else _only(launch.cubin)
        row = Compiled(
            backend=backend,
            operator=call.operator.name,
            kernel=names.kernel_of(launch.kernel),
            arch=arch,
            problem=call.name,
            dtype=call.problem.dtype,
            instance=names.instance_of(launch.kernel),
            threads=threads,
            registers=code.registers,
            shared=code.shared + launch.shared,
            stack=code.stack,
            spills=code.spills,
            tensor_cores=code.tensor_cores,
            atomics=code.atomics,
            widest_load=code.widest_load,
            widest_store=code.widest_store,
        )
        rows[row.key] = row
    return rows


def traffic_rows(runs: Iterable[Run], backend: str, arch: int) -> dict[Key, Traffic]:
    """What the launches did, each alone and those of a call together."""
    rows: dict[Key, Traffic] = {}
    for run in runs:
        kernels = [run.operator.kernel(names.kernel_of(launch.kernel), backend) for launch in run.launches]
        useful = [kernel.macs(run.problem) if kernel.tensor_cores(run.problem) else 0 for kernel in kernels]
        parts = [
            (kernel.name, [launch], kernel.bytes(run.problem), macs)
            for launch, kernel, macs in zip(run.launches, kernels, useful, strict=True)
        ]
        for part in (*parts, (WHOLE_OPERATOR, run.launches, run.operator.bytes(run.problem), sum(useful))):
            row = _traffic(run, backend, arch, *part)
            rows[row.key] = row
    return rows


def compiler(backend: str) -> str:
    """What turns the kernels of ``backend`` into machine code here."""
    if backend == "cuda":
        return f"nvcc {cubin.compiler_of_library(LIBRARY.read_bytes())}"
    import triton

    tools = (triton.knobs.nvidia.ptxas, triton.knobs.nvidia.ptxas_blackwell)
    return f"Triton {triton.__version__} with ptxas {' and '.join(tool.version for tool in tools)}"


def bytes_per_lane(opcode: str) -> int:
    """Bytes of global memory that one lane reads or writes by a PTX instruction; 0 if it touches none."""
    if opcode.startswith(("cp.async.bulk", "cp.async.cg")):
        return 16
    if opcode.startswith("cp.async.ca"):
        return 4  # at least; the mnemonic does not say whether 4, 8 or 16
    match = re.match(r"(?:ld|st)\.(?:\S+\.)?global\.(?:\S+\.)?[bfsu](\d+)$", opcode)
    lanes = re.search(r"\.v(\d)\.", opcode)
    return int(match.group(1)) // 8 * int(lanes.group(1) if lanes else 1) if match else 0


def _only(binary: bytes) -> cubin.MachineCode:
    (code,) = cubin.read(binary).values()
    return code


def _runs(
    operators: Iterable[Operator], backend: str, arch: int, *, execute: bool, sized_as: int | None = None
) -> Iterator[Run]:
    """Call every operator on every problem on the emulated GPU."""
    for operator in operators:
        kernels = [kernel for kernel in operator.kernels if backend in kernel.backends]
        for name, sizes in operator.problems.items() if kernels else ():
            for dtype in operator.dtypes:
                problem = Problem(sizes, dtype, arch)
                with EmulatedCuda(backend, arch, execute=execute, sized_as=sized_as) as emulated:
                    operator.call(problem)
                launched = sorted(names.kernel_of(launch.kernel) for launch in emulated.launches)
                expected = sorted(kernel.name for kernel in kernels if kernel.runs(problem))
                if launched != expected:
                    raise LookupError(
                        f"{operator.name} ({backend}, problem {name!r}, {dtype}) launches {launched}, but its entry in"
                        f" gates/cases says {expected}"
                    )
                yield Run(operator, name, problem, emulated.launches)


def _traffic(
    run: Run, backend: str, arch: int, kernel: str, launches: list[Any], compulsory: int, macs: int
) -> Traffic:
    def total(field: str) -> int:
        return sum(getattr(launch.statistics, field) for launch in launches)

    def per_request(what: str) -> float:
        return round(total(f"{what}_waves") / max(1, total(f"{what}_requests")), 4)

    asked = [(bytes_per_lane(opcode), count) for launch in launches for opcode, count in launch.opcodes.items()]
    wide = sum(width * count for width, count in asked if width >= 16)
    return Traffic(
        backend=backend,
        operator=run.operator.name,
        kernel=kernel,
        arch=arch,
        problem=run.name,
        dtype=run.problem.dtype,
        compulsory=compulsory,
        moved=SECTOR * (total("global_load_sectors") + total("global_store_sectors")),
        distinct=SECTOR * (total("global_load_distinct_sectors") + total("global_store_distinct_sectors")),
        buffers=total("global_load_buffers") + total("global_store_buffers"),
        wide_share=round(wide / max(1, sum(width * count for width, count in asked)), 4),
        load_waves=per_request("shared_load"),
        store_waves=per_request("shared_store"),
        macs=macs,
        macs_executed=total("matrix_macs"),
    )
