"""Measures the kernels that the cases launch: their machine code, and what they do when emulated."""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import runpy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from emulated_cuda import EmulatedCuda, cuda_library
from ptx_emulator import Emulator
from ptx_emulator.build import BuildError, build_emulator

import mlip_kernels
from gates import cubin, names, occupancy
from gates.budgets import ARCH, Budget
from gates.cases import OPERATORS
from gates.promises import Operator, Problem
from gates.records import SECTOR, WHOLE_OPERATOR, Compiled, Key, Slope, SlopeKey, Traffic

LIBRARY = Path(mlip_kernels.__file__).with_name("_cuda.so")
"""The CUDA C++ kernels as shipped. Where it was not built, its files are compiled with the same flags."""
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
def shipped(arch: int) -> dict[str, cubin.MachineCode]:
    """Every CUDA C++ kernel of the package for an architecture, by its readable name; none if it was not built."""
    codes = (item for binary in binaries(arch) for item in cubin.read(binary).items())
    return {names.readable(name): code for (built_for, name), code in codes if built_for == arch}


def binaries(arch: int) -> list[bytes]:
    """The files with the CUDA C++ kernels of an architecture."""
    return [LIBRARY.read_bytes()] if LIBRARY.exists() else cuda_library.OPERATORS.cubins(arch)


@functools.cache
def compiled(backend: str, arch: int, operators: tuple[Operator, ...] = OPERATORS) -> dict[Key, Compiled]:
    """Every instance of every kernel that the cases launch, compiled for ``arch``."""
    launched = arch if backend == "triton" else EXECUTED[0]  # the PTX of which is not looked at
    return compiled_rows(_runs(operators, backend, launched, execute=False, sized_as=arch), backend, arch)


def slopes(backend: str, budgets: Iterable[Budget]) -> dict[SlopeKey, Slope]:
    """What one more unit of work adds to the launches of an operator, where it launches any."""
    found: dict[SlopeKey, Slope] = {}
    for budget in budgets:
        smaller, larger = budget.problems()
        launches = []
        for problem in (smaller, larger):
            with EmulatedCuda(backend, ARCH, multiprocessors=1) as emulated:
                budget.run(problem)
            launches.append(emulated.launches)
        if all(launches):
            row = _slope(backend, budget, *launches, budget.units(larger) - budget.units(smaller))
            found[row.key] = row
    return found


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
    for call, launch in ((run, launch) for run in _disassembled(runs, backend, arch) for launch in run.launches):
        instance = names.readable(launch.kernel)
        threads = math.prod(launch.block)
        asked_for = launch.metadata["hash"] if backend == "triton" else instance
        same = (asked_for, threads, launch.shared)
        if same in seen:
            continue
        seen.add(same)
        code = machine_code(launch, backend, arch)
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
    for run in _disassembled(runs, backend, arch):
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
        return f"nvcc {cubin.compiler_of(binaries(EXECUTED[0])[0])}"
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


def _disassembled(runs: Iterable[Run], backend: str, arch: int) -> list[Run]:
    """The runs, with what Triton compiled for them read in one go."""
    runs = list(runs)
    if backend == "triton":
        cubin.read_kernels((launch.cubin for run in runs for launch in run.launches), arch)
    return runs


def machine_code(launch: Any, backend: str, arch: int) -> cubin.MachineCode:
    """What was launched, compiled for ``arch``."""
    if backend == "cuda":
        return shipped(arch)[names.readable(launch.kernel)]
    (code,) = cubin.read(launch.cubin).values()
    return code


def resident(launch: Any, code: cubin.MachineCode) -> int:
    """Blocks of a launch that fit on a multiprocessor at once."""
    threads = math.prod(launch.block)
    return occupancy.blocks_per_multiprocessor(code.arch, threads, code.registers, code.shared + launch.shared)


def warps(launch: Any) -> int:
    """Of one block."""
    return -(-math.prod(launch.block) // occupancy.WARP)


def barriers(launches: Iterable[Any]) -> int:
    """At which blocks wait: what the emulator counts is warps that arrive."""
    return sum(launch.statistics.barriers // warps(launch) for launch in launches)


def products(launches: Iterable[Any], kind: str) -> int:
    """Instructions on tensor cores whose name has this in it, executed by warps."""
    executed = (item for launch in launches for item in launch.opcodes.items())
    return sum(count for opcode, count in executed if re.match(r"(wg)?mma\.", opcode) and kind in opcode)


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


def _slope(backend: str, budget: Budget, smaller: list[Any], larger: list[Any], units: int) -> Slope:
    def more(count: Callable[[list[Any]], int]) -> float:
        return round((count(larger) - count(smaller)) / units, 2)

    def total(field: str) -> Callable[[list[Any]], int]:
        return lambda launches: sum(getattr(launch.statistics, field) for launch in launches)

    main = max(larger, key=lambda launch: launch.statistics.warp_instructions)
    sectors = more(total("global_load_sectors")) + more(total("global_store_sectors"))
    return Slope(
        backend=backend,
        unit=budget.unit,
        operator=budget.operator,
        instructions=more(total("warp_instructions")),
        moved=round(SECTOR * sectors, 2),
        waves=round(more(total("shared_load_waves")) + more(total("shared_store_waves")), 2),
        barriers=more(barriers),
        macs_executed=more(total("matrix_macs")),
        warpgroup_products=more(lambda launches: products(launches, "wgmma.mma_async")),
        tf32_products=more(lambda launches: products(launches, "tf32")),
        warps=warps(main),
        resident=resident(main, machine_code(main, backend, ARCH)),
    )


def _traffic(
    run: Run, backend: str, arch: int, kernel: str, launches: list[Any], compulsory: int, macs: int
) -> Traffic:
    def total(field: str) -> int:
        return sum(getattr(launch.statistics, field) for launch in launches)

    def per_request(what: str) -> float:
        return round(total(f"{what}_waves") / max(1, total(f"{what}_requests")), 4)

    (alone, code) = (
        (launches[0], machine_code(launches[0], backend, arch)) if kernel != WHOLE_OPERATOR else (None, None)
    )
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
        units=run.operator.unit.count(run.problem),
        instructions=total("warp_instructions"),
        waves=total("shared_load_waves") + total("shared_store_waves"),
        barriers=barriers(launches),
        warpgroup_products=products(launches, "wgmma.mma_async"),
        tf32_products=products(launches, "tf32"),
        warps=warps(alone) if alone else 0,
        resident=resident(alone, code) if alone else 0,
        ptx=Emulator(arch).load(alone.ptx).kernels[alone.kernel].instructions if alone else 0,
        machine=code.instructions if code else 0,
    )
