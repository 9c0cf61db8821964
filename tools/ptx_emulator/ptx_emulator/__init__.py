"""Executes compiled GPU kernels on the CPU: PTX, as nvcc and Triton make it, with everything watched.

    emulator = Emulator(90)
    launch = emulator.launch(ptx, "kernel", grid=(4,), block=128, arguments=[x, y, x.numel()])
    launch.statistics.global_load_sectors

The result is in the tensors afterwards. Whatever goes wrong on the way, an access out of bounds, a race, a barrier
that some threads never reach, raises `EmulatorError` and names the instruction, its source line, block, warp, lane
and buffer. README.md says what this can show and what it cannot.
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import numpy as np

from .build import BuildError, build_emulator

__all__ = [
    "Buffer",
    "BuildError",
    "Emulator",
    "EmulatorError",
    "Fault",
    "Kernel",
    "Launch",
    "Parameter",
    "Program",
    "PtxError",
    "Statistics",
    "UnsupportedError",
    "instructions",
]

SCHEDULES = ("round_robin", "reversed", "random")


class PtxError(ValueError):
    """The text is not PTX that the emulator can read."""


@dataclass(frozen=True)
class Fault:
    """One thing that went wrong, where it was seen first."""

    kind: str
    message: str
    kernel: str
    ptx_line: int
    instruction: str
    source: str
    block: tuple[int, int, int]
    warp: int
    lane: int
    address: int
    buffer: str
    offset: int

    def __str__(self) -> str:
        where = f"{self.kernel}, block {self.block}, warp {self.warp}, lane {self.lane}"
        memory = f", {self.buffer} + {self.offset} (0x{self.address:x})" if self.buffer else ""
        source = f" from {self.source}" if self.source else ""
        return f"{self.kind}: {self.message}\n  {where}{memory}\n  PTX line {self.ptx_line}{source}: {self.instruction}"


class EmulatorError(AssertionError):
    """A kernel did something that a GPU punishes, or only forgives by luck. ``faults`` says what."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = list(faults)
        super().__init__("\n".join(map(str, self.faults)))

    @property
    def kinds(self) -> set[str]:
        return {fault.kind for fault in self.faults}


class UnsupportedError(EmulatorError):
    """The kernel uses an instruction that the emulator does not know."""

    def __init__(self, kernel: str, reason: str) -> None:
        AssertionError.__init__(self, f"{kernel} cannot be emulated: {reason}")
        self.faults = []


@dataclass(frozen=True)
class Buffer:
    """Memory that a kernel may touch: ``size`` bytes at ``address``."""

    address: int
    size: int
    name: str
    writable: bool = True


@dataclass(frozen=True)
class Parameter:
    name: str
    offset: int
    size: int
    type: str


@dataclass(frozen=True)
class Kernel:
    name: str
    parameters: tuple[Parameter, ...]
    parameter_bytes: int
    static_shared: int
    local_bytes: int
    instructions: int
    unsupported: str | None


@dataclass(frozen=True)
class Program:
    """A parsed PTX text."""

    text: str = field(repr=False)
    kernels: dict[str, Kernel]
    parsed: Any = field(repr=False)


@dataclass(frozen=True)
class Statistics:
    """What a launch did. A sector is 32 bytes; a wave is one pass over the banks of shared memory.

    ``ideal`` sectors are what the bytes of each request would fill if they lay together; ``global_load`` includes
    asynchronous copies. ``distinct`` sectors are counted once in a launch, however often they are asked for, apart for
    loads and stores: what has to cross DRAM where the L2 cache keeps the rest. ``buffers`` are those of which any
    sector was touched. Atomics count in neither.
    """

    warp_instructions: int = 0
    lane_instructions: int = 0
    divergent: int = 0
    barriers: int = 0
    atomics: int = 0
    global_load_requests: int = 0
    global_load_sectors: int = 0
    global_load_ideal_sectors: int = 0
    global_load_bytes: int = 0
    global_store_requests: int = 0
    global_store_sectors: int = 0
    global_store_ideal_sectors: int = 0
    global_store_bytes: int = 0
    global_load_distinct_sectors: int = 0
    global_load_buffers: int = 0
    global_store_distinct_sectors: int = 0
    global_store_buffers: int = 0
    async_copy_bytes: int = 0
    shared_load_requests: int = 0
    shared_load_waves: int = 0
    shared_store_requests: int = 0
    shared_store_waves: int = 0
    matrix_instructions: int = 0
    matrix_macs: int = 0
    duplicate_stores: int = 0


@dataclass(frozen=True)
class Launch:
    """A kernel that ran to its end without a fault."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    arch: int
    statistics: Statistics
    opcodes: dict[str, int]  # mnemonic -> executions by warps


class Emulator:
    """A GPU of compute capability ``arch`` (80 is 8.0) that runs PTX on CPU memory.

    Args:
        schedule: how the warps of a block take turns: ``round_robin`` and ``reversed`` run each until it waits at a
            barrier, ``random`` interrupts it after a few instructions, as ``seed`` decides.
        races: find accesses that no barrier orders, between warps, blocks, and the lanes of a warp.
        uninitialised: find reads of shared memory that nobody wrote.
        statistics: count sectors and bank conflicts.
        instruction_limit: of warps, in one launch; beyond it the kernel is taken to hang.
    """

    def __init__(
        self,
        arch: int,
        *,
        schedule: str = "round_robin",
        seed: int = 0,
        races: bool = True,
        uninitialised: bool = True,
        statistics: bool = True,
        instruction_limit: int = 2_000_000_000,
        max_faults: int = 20,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {SCHEDULES}, got {schedule!r}")
        self.arch = arch
        self.schedule = schedule
        self.seed = seed
        self.races = races
        self.uninitialised = uninitialised
        self.statistics = statistics
        self.instruction_limit = instruction_limit
        self.max_faults = max_faults

    def load(self, ptx: str) -> Program:
        """Parse a PTX text, once.

        Raises:
            PtxError: it cannot be read. An instruction that is not known only makes its kernel unsupported.
        """
        return _load(ptx)

    def launch(
        self,
        program: Program | str,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        arguments: Sequence[Any] | bytes,
        *,
        shared: int = 0,
        buffers: Sequence[Buffer] | None = None,
    ) -> Launch:
        """Run ``kernel`` of a program, or of a PTX text, to its end.

        Args:
            grid, block: blocks and threads along x, y and z.
            arguments: for each parameter a tensor, an array, a number, or its bytes; or the bytes of all of them.
            shared: dynamic shared memory, in bytes.
            buffers: what the kernel may touch; by default the storage of each tensor among the arguments.

        Raises:
            EmulatorError: something went wrong; UnsupportedError if the kernel cannot be emulated.
            ValueError: the launch itself is impossible: no such kernel, a block that is too large, too many arguments.
        """
        program = self.load(program) if isinstance(program, str) else program
        if kernel not in program.kernels:
            raise ValueError(f"kernel: expected one of {sorted(program.kernels)}, got {kernel!r}")
        described = program.kernels[kernel]
        if described.unsupported:
            raise UnsupportedError(kernel, described.unsupported)
        packed, found = (arguments, []) if isinstance(arguments, bytes) else _pack(described, arguments)
        grid3, block3 = _three("grid", grid), _three("block", block)
        options = {
            "schedule": SCHEDULES.index(self.schedule),
            "seed": self.seed,
            "races": self.races,
            "uninitialised": self.uninitialised,
            "statistics": self.statistics,
            "instruction_limit": self.instruction_limit,
            "max_faults": self.max_faults,
        }
        accessible = [(b.address, b.size, b.name, b.writable) for b in (found if buffers is None else buffers)]
        faults, statistics, opcodes = _module().launch(
            program.parsed, kernel, list(grid3), list(block3), shared, packed, accessible, options
        )
        if faults:
            raise EmulatorError([Fault(**fault) for fault in faults])
        return Launch(kernel, grid3, block3, shared, self.arch, Statistics(**statistics), opcodes)


def instructions() -> list[str]:
    """Every instruction that the emulator executes: base name and first type, as ``add.f32``."""
    return _module().instructions()


@cache
def _module() -> Any:
    library = build_emulator()
    spec = importlib.util.spec_from_file_location("_ptx_emulator", library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lru_cache(maxsize=256)
def _load(ptx: str) -> Program:
    try:
        parsed = _module().parse(ptx)
    except _module().ParseError as failure:
        raise PtxError(str(failure)) from None
    kernels = {}
    for name, described in parsed.kernels.items():
        parameters = tuple(Parameter(*parameter) for parameter in described.pop("parameters"))
        unsupported = described.pop("unsupported") or None
        kernels[name] = Kernel(name=name, parameters=parameters, unsupported=unsupported, **described)
    return Program(ptx, kernels, parsed)


def _three(name: str, size: int | Sequence[int]) -> tuple[int, int, int]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"{name}: expected one to three integers, got {size!r}")
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def _pack(kernel: Kernel, arguments: Sequence[Any]) -> tuple[bytes, list[Buffer]]:
    """The parameter block, and the buffers behind the tensors."""
    if len(arguments) != len(kernel.parameters):
        raise ValueError(f"arguments: {kernel.name} takes {len(kernel.parameters)}, got {len(arguments)}")
    packed = bytearray(kernel.parameter_bytes)
    buffers: dict[int, Buffer] = {}
    for index, (parameter, argument) in enumerate(zip(kernel.parameters, arguments, strict=True)):
        name = f"argument {index}"
        if hasattr(argument, "untyped_storage"):
            storage = argument.untyped_storage()
            buffers.setdefault(storage.data_ptr(), Buffer(storage.data_ptr(), storage.nbytes(), name))
            argument = argument.data_ptr()
        elif isinstance(argument, np.ndarray):
            buffers.setdefault(argument.ctypes.data, Buffer(argument.ctypes.data, argument.nbytes, name))
            argument = argument.ctypes.data
        packed[parameter.offset : parameter.offset + parameter.size] = _pack_one(name, parameter, argument)
    return bytes(packed), [buffer for buffer in buffers.values() if buffer.size]


def _pack_one(name: str, parameter: Parameter, argument: Any) -> bytes:
    if isinstance(argument, (bytes, bytearray)):
        if len(argument) != parameter.size:
            raise ValueError(f"{name}: expected {parameter.size} bytes, got {len(argument)}")
        return bytes(argument)
    if isinstance(argument, float):
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[parameter.size], argument)
    if isinstance(argument, (int, np.integer)):
        return (int(argument) % (1 << 8 * parameter.size)).to_bytes(parameter.size, "little")
    raise TypeError(f"{name}: expected a tensor, an array, a number or bytes, got {type(argument).__name__}")
