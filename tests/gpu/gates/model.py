"""A model of how long a kernel takes on GPUs that are not there, and of what it waits for. **No GPU gave these times.**

    issue           warp instructions (PTX, as the emulator counted them) / (multiprocessors x 4 schedulers x clock x u)
    DRAM            compulsory bytes x (distinct / compulsory, as counted) / bandwidth
    L2              bytes of all sectors that accesses touch / bandwidth between L2 and the multiprocessors
    shared memory   passes over shared memory / (multiprocessors x clock)
    tensor cores    multiply-adds that they execute / what large products reach

The slowest of these is the time; nothing else is counted, and nothing is added. ``u``, the share of issue slots that a
kernel fills, depends on how many warps are resident (`issue_share`): it is a guess, which a measurement corrects. A
factor of 1.5 either way is to be expected. What is left out: launches, tails of grids that do not fill the GPU, waits
on barriers and memory beyond ``u``, and whatever ptxas changes (`Traffic.machine` against `Traffic.ptx`).

Rates are what large kernels reach, not data sheets: the copy and the products of an H200 were measured (4.3 TB/s,
770 to 798 TFLOP/s in bfloat16 with 8,192 rows, of which other shapes reach 700); H100 and A100 are scaled from their
data sheets by the same shares.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gates.promises import Operator

SCHEDULERS = 4  # of a multiprocessor; each issues an instruction per clock
FILLED = ((0, 0.0), (4, 0.2), (8, 0.375), (12, 0.5), (16, 0.55), (24, 0.6), (48, 0.7))
"""Resident warps of a multiprocessor -> share of issue slots that they fill, between these in proportion."""


@dataclass(frozen=True)
class GPU:
    """What one GPU can do, per second."""

    name: str
    arch: int  # whose counts it is modelled on
    multiprocessors: int
    clock: float
    memory: float  # bytes
    cache: float  # bytes from L2
    products: float  # flop in half precision by wgmma, or by mma where there is no other; TF32 has half
    mma_share: float  # of these, what mma.sync reaches


H200 = GPU("H200", 90, 132, 1.98e9, memory=4.3e12, cache=5.5e12, products=700e12, mma_share=0.62)
H100 = GPU("H100", 90, 132, 1.98e9, memory=3.0e12, cache=5.5e12, products=700e12, mma_share=0.62)
A100 = GPU("A100", 80, 108, 1.41e9, memory=1.8e12, cache=4.0e12, products=250e12, mma_share=1.0)
GPUS = (H200, H100, A100)


class Times(NamedTuple):
    """Seconds that each resource takes."""

    issue: float
    dram: float
    l2: float
    shared_memory: float
    tensor_cores: float

    @property
    def total(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return dict(zip(self, RESOURCES, strict=True))[self.total]


RESOURCES = ("issue", "DRAM", "L2", "shared memory", "tensor cores")


def issue_share(warps: int) -> float:
    """``u`` for so many resident warps."""
    for (fewer, low), (more, high) in itertools.pairwise(FILLED):
        if warps <= more:
            return low + (high - low) * (warps - fewer) / (more - fewer)
    return FILLED[-1][1]


def times(counts: Mapping[str, Any], amount: float, bytes_needed: float, gpu: GPU) -> Times:
    """Of ``amount`` times what was counted.

    Args:
        counts: a row of `Traffic` or `Slope`.
        amount: how many times as much work there is.
        bytes_needed: of all of it, from or to DRAM.
        gpu: which to model.
    """
    clocks = gpu.multiprocessors * gpu.clock
    slots = clocks * SCHEDULERS * issue_share(counts["resident"] * counts["warps"])
    products = gpu.products * (0.5 if counts["tf32_products"] else 1)
    products *= 1 if counts["warpgroup_products"] else gpu.mma_share
    return Times(
        issue=amount * counts["instructions"] / slots,
        dram=bytes_needed / gpu.memory,
        l2=amount * counts["moved"] / gpu.cache,
        shared_memory=amount * counts["waves"] / clocks,
        tensor_cores=amount * 2 * counts["macs_executed"] / products,
    )


def kernel_times(operator: Operator, row: Mapping[str, Any], gpu: GPU) -> Times:
    """Of one kernel: as many units as training has, each as large as in the problem of the row.

    Args:
        operator: its entry.
        row: of the table, for the architecture of ``gpu``.
        gpu: which to model.
    """
    full = operator.grown(row["problem"], row["dtype"], gpu.arch)
    needed = operator.kernel(row["kernel"], row["backend"]).bytes(full) * row["distinct"] / row["compulsory"]
    return times(row, operator.unit.count(full) / row["units"], needed, gpu)
