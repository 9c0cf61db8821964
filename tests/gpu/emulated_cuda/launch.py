"""What is launched, and what a GPU would refuse to launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gates.occupancy import MULTIPROCESSORS
from ptx_emulator import Statistics

MULTIPROCESSOR_COUNT = 2
"""So few that problems that are quick to emulate fill the GPU, and each block has as much to do as in large problems
on a large GPU."""
SHARED_WITHOUT_ASKING = 48 << 10  # bytes; a kernel that wants more has to say so beforehand
MOST_SHARED = {arch: limits.shared_per_block for arch, limits in MULTIPROCESSORS.items()}  # bytes per block
MOST_BLOCKS = (0x7FFFFFFF, 0xFFFF, 0xFFFF)
MOST_THREADS = (1024, 1024, 64)
MOST_THREADS_PER_BLOCK = 1024


class LaunchError(RuntimeError):
    """The CUDA runtime would not start this kernel; ``code`` is its cudaError_t."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


INVALID_VALUE, INVALID_CONFIGURATION, LAUNCH_FAILURE = 1, 9, 719


@dataclass(frozen=True)
class Compiled:
    """A kernel as its compiler left it. Triton also tells its machine code and options; nvcc's PTX has many kernels."""

    kernel: str  # its name in the PTX
    arch: int
    ptx: str = field(repr=False)
    cubin: bytes | None = field(default=None, repr=False)
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class LaunchRecord:
    """One launch: which kernel, how large, and, if it was executed, what it did."""

    compiled: Compiled
    backend: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # dynamic shared memory in bytes
    statistics: Statistics | None = field(repr=False)
    opcodes: dict[str, int] = field(repr=False)  # executions by a warp, per instruction

    @property
    def kernel(self) -> str:
        return self.compiled.kernel

    @property
    def arch(self) -> int:
        return self.compiled.arch

    @property
    def ptx(self) -> str:
        return self.compiled.ptx

    @property
    def cubin(self) -> bytes | None:
        return self.compiled.cubin

    @property
    def metadata(self) -> dict[str, Any]:
        return self.compiled.metadata


def attributes(arch: int, multiprocessors: int) -> dict[int, int]:
    """What cudaDeviceGetAttribute knows: cudaDeviceAttr -> value."""
    limits = MULTIPROCESSORS[arch]
    return {16: multiprocessors, 81: limits.shared, 111: limits.reserved}


def check_configuration(kernel: str, grid: Sequence[int], block: Sequence[int]) -> None:
    """Refuse a grid or a block that no GPU takes."""
    threads = block[0] * block[1] * block[2]
    for what, sizes, most in (("grid", grid, MOST_BLOCKS), ("block", block, MOST_THREADS)):
        if not all(1 <= size <= limit for size, limit in zip(sizes, most, strict=True)):
            message = f"{kernel}: {what} {tuple(sizes)} is outside 1 to {most}"
            raise LaunchError(message, INVALID_CONFIGURATION)
    if threads > MOST_THREADS_PER_BLOCK:
        message = f"{kernel}: a block of {threads} threads; {MOST_THREADS_PER_BLOCK} is the most"
        raise LaunchError(message, INVALID_CONFIGURATION)


def check_shared(kernel: str, arch: int, *, static: int, dynamic: int, allowed: int) -> None:
    """Refuse more dynamic shared memory than was asked for beforehand, or than the architecture has."""
    if static + dynamic > MOST_SHARED[arch]:
        message = f"{kernel}: {static} + {dynamic} bytes of shared memory; sm_{arch} has {MOST_SHARED[arch]}"
        raise LaunchError(message, INVALID_VALUE)
    if static + dynamic > max(SHARED_WITHOUT_ASKING, static + allowed):
        message = (
            f"{kernel}: {dynamic} bytes of dynamic shared memory, but cudaFuncSetAttribute allowed {allowed},"
            f" and without it a block has {SHARED_WITHOUT_ASKING} in all"
        )
        raise LaunchError(message, INVALID_VALUE)
