"""How many blocks of a kernel fit on one multiprocessor at once, from what the kernel takes and what the GPU has.

The limits are those of the CUDA C++ Programming Guide 13.0, section 20.2 "Features and Technical Specifications"
(table "Technical Specifications per Compute Capability"); granularities of allocation are those of NVIDIA's own
``cuda_occupancy.h``, against which a test holds this file. Clusters and named barriers are left out: kernels that use
them can fit fewer blocks than is said here.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536  # per multiprocessor, and at most as many per block
REGISTER_GRANULARITY = 256  # registers are handed to warps in units of this
PARTITIONS = 4  # of a multiprocessor; each has a quarter of the registers
MOST_REGISTERS = 255  # per thread
MOST_THREADS = 1024  # per block


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one compute capability."""

    warps: int
    blocks: int
    shared: int  # bytes of shared memory per multiprocessor
    shared_per_block: int  # at most so much for one block, opted in
    reserved: int  # bytes that the driver takes of it for each block
    granularity: int  # shared memory is allocated in units of this


KIB = 1024
MULTIPROCESSORS = {
    75: Multiprocessor(32, 16, 64 * KIB, 64 * KIB, 0, 256),
    80: Multiprocessor(64, 32, 164 * KIB, 163 * KIB, KIB, 128),
    86: Multiprocessor(48, 16, 100 * KIB, 99 * KIB, KIB, 128),
    89: Multiprocessor(48, 24, 100 * KIB, 99 * KIB, KIB, 128),
    90: Multiprocessor(64, 32, 228 * KIB, 227 * KIB, KIB, 128),
    100: Multiprocessor(64, 32, 228 * KIB, 227 * KIB, KIB, 128),
    120: Multiprocessor(48, 24, 100 * KIB, 99 * KIB, KIB, 128),
}


def blocks_per_multiprocessor(arch: int, threads: int, registers: int, shared: int) -> int:
    """Blocks that fit at once; 0 if the kernel cannot be launched at all.

    Args:
        arch: compute capability as in sm_90.
        threads: per block.
        registers: per thread.
        shared: bytes of shared memory per block, static and dynamic together.
    """
    limits = MULTIPROCESSORS[arch]
    if threads > MOST_THREADS or shared > limits.shared_per_block:
        return 0
    warps = -(-threads // WARP)
    fitting = [limits.blocks, limits.warps // warps]
    if registers:
        per_warp = _round_up(registers * WARP, REGISTER_GRANULARITY)
        if registers > MOST_REGISTERS or per_warp * _round_up(warps, PARTITIONS) > REGISTERS:
            return 0
        fitting.append(REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps)
    if shared + limits.reserved:
        fitting.append(limits.shared // _round_up(shared + limits.reserved, limits.granularity))
    return min(fitting)


def occupancy(arch: int, threads: int, blocks: int) -> float:
    """Share of the multiprocessor's warps that ``blocks`` blocks keep."""
    return blocks * -(-threads // WARP) / MULTIPROCESSORS[arch].warps


def register_budget(arch: int, threads: int, blocks: int) -> int:
    """The most registers per thread with which ``blocks`` blocks still fit."""
    fits = (r for r in range(MOST_REGISTERS, 0, -1) if blocks_per_multiprocessor(arch, threads, r, 0) >= blocks)
    return next(fits, 0)


def shared_budget(arch: int, blocks: int) -> int:
    """The most bytes of shared memory per block with which ``blocks`` blocks still fit."""
    limits = MULTIPROCESSORS[arch]
    share = limits.shared // max(blocks, 1) // limits.granularity * limits.granularity
    return min(share - limits.reserved, limits.shared_per_block)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
