"""The three kinds of rows in the table: what a compiled kernel takes, what an executed kernel does, and how much of
that one more unit of work adds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from gates import occupancy

WHOLE_OPERATOR = "*"
"""Stands in place of a kernel's name where the kernels of an operator are taken together."""
SECTOR = 32  # bytes: the unit in which global memory moves


class Key(NamedTuple):
    """Which row: it is the same row where these are the same."""

    backend: str
    operator: str
    kernel: str
    arch: int
    problem: str
    dtype: str

    def __str__(self) -> str:
        kernel = f"all kernels of {self.operator}" if self.kernel == WHOLE_OPERATOR else self.kernel
        return f"{kernel} ({self.backend}, sm_{self.arch}, {self.problem} {self.dtype})"


@dataclass(frozen=True)
class Row:
    backend: str
    operator: str
    kernel: str
    arch: int
    problem: str
    dtype: str

    @property
    def key(self) -> Key:
        return Key(self.backend, self.operator, self.kernel, self.arch, self.problem, self.dtype)

    def fields(self) -> dict[str, Any]:
        """What the table stores."""
        return asdict(self)


@dataclass(frozen=True)
class Compiled(Row):
    """A kernel as compiled, under the first problem and dtype that launch this instance of it."""

    instance: str  # template arguments, CUDA C++ only
    threads: int  # per block, as launched
    registers: int  # per thread
    shared: int  # bytes per block, static and dynamic
    stack: int  # bytes per thread
    spills: int  # instructions
    tensor_cores: int  # instructions
    atomics: int  # instructions
    widest_load: int  # bytes
    widest_store: int

    @property
    def blocks(self) -> int:
        """Blocks that fit on a multiprocessor at once."""
        return occupancy.blocks_per_multiprocessor(self.arch, self.threads, self.registers, self.shared)

    @property
    def occupancy(self) -> float:
        return occupancy.occupancy(self.arch, self.threads, self.blocks)

    @property
    def register_budget(self) -> int:
        """How far the registers may grow before fewer blocks fit."""
        return occupancy.register_budget(self.arch, self.threads, self.blocks)

    @property
    def shared_budget(self) -> int:
        return occupancy.shared_budget(self.arch, self.blocks)

    def fields(self) -> dict[str, Any]:
        derived = ("blocks", "register_budget", "shared_budget")
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True)
class Traffic(Row):
    """A kernel as executed by the emulator, or all kernels of an operator together."""

    compulsory: int  # bytes
    moved: int  # bytes: sectors that its accesses to global memory touched, as often as they did
    distinct: int  # bytes: those sectors once in a launch for reading and once for writing
    buffers: int  # of which it read any, and of which it wrote any, in each launch
    wide_share: float  # of the bytes that its warps ask for, those asked for 16 at a time
    load_waves: float  # passes over shared memory per request; more than the width asks for are bank conflicts
    store_waves: float
    macs: int  # useful ones, on tensor cores
    macs_executed: int  # on tensor cores
    units: int  # of work, as the operator's entry counts it
    instructions: int  # of PTX, executed by warps
    waves: int  # passes over shared memory
    barriers: int  # at which blocks wait
    warpgroup_products: int  # wgmma instructions, executed by warps; other products are mma
    tf32_products: int  # instructions of either kind on TF32, at half the rate of half precision
    warps: int  # of a block; 0 of a whole operator, as are the next ones
    resident: int  # blocks that fit on a multiprocessor at once
    ptx: int  # instructions in the text of the kernel
    machine: int  # and in its machine code

    @property
    def ratio(self) -> float:
        return self.moved / self.compulsory

    @property
    def distinct_ratio(self) -> float:
        return self.distinct / self.compulsory

    def fields(self) -> dict[str, Any]:
        derived = {
            "ratio": round(self.ratio, 4),
            "distinct_ratio": round(self.distinct_ratio, 4),
            "instructions_per_unit": round(self.instructions / self.units, 1),
            "instructions_per_byte": round(self.instructions / self.compulsory, 4),
        }
        return asdict(self) | derived


class SlopeKey(NamedTuple):
    """Which slope."""

    backend: str
    unit: str

    def __str__(self) -> str:
        return f"{self.unit} ({self.backend})"


@dataclass(frozen=True)
class Slope:
    """What one more unit of work adds to all launches of an operator: the difference of two sizes."""

    backend: str
    unit: str  # the name of the budget
    operator: str
    instructions: float  # of PTX, executed by warps
    moved: float  # bytes
    waves: float  # passes over shared memory
    barriers: float  # at which blocks wait
    macs_executed: float  # on tensor cores
    warpgroup_products: float  # wgmma instructions, executed by warps
    tf32_products: float  # products of TF32
    warps: int  # of a block of the launch that executes most of the instructions
    resident: int  # blocks of it that fit on a multiprocessor at once

    @property
    def key(self) -> SlopeKey:
        return SlopeKey(self.backend, self.unit)

    def fields(self) -> dict[str, Any]:
        """What the table stores."""
        return asdict(self)
