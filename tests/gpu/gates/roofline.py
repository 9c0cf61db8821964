"""A time that no H100 can beat: the compulsory bytes at the full bandwidth, or the needed multiply-adds at the full
rate, whichever takes longer. It is a bound, not a prediction: launches, caches and dependencies all come on top.

Rates are those of the H100 SXM in NVIDIA's "H100 Tensor Core GPU" data sheet; for tensor cores, half of the figures
that it gives with sparsity.
"""

from __future__ import annotations

from gates.promises import Kernel, Problem

BANDWIDTH = 3.35e12  # bytes/s of HBM3
TENSOR_CORES = {"fp16": 989.5e12, "bf16": 989.5e12, "fp32": 494.5e12}  # flop/s; float32 runs there as TF32
FLOAT32 = 67e12  # flop/s outside the tensor cores


def lower_bound(kernel: Kernel, problem: Problem) -> float:
    """Seconds."""
    return max(_seconds(kernel, problem).values())


def bound_by(kernel: Kernel, problem: Problem) -> str:
    """What takes these seconds: ``memory``, ``tensor cores`` or ``float32 units``."""
    seconds = _seconds(kernel, problem)
    return max(seconds, key=seconds.__getitem__)


def _seconds(kernel: Kernel, problem: Problem) -> dict[str, float]:
    """What each resource takes at its full rate."""
    on_tensor_cores = kernel.tensor_cores(problem)
    units, rate = ("tensor cores", TENSOR_CORES[problem.dtype]) if on_tensor_cores else ("float32 units", FLOAT32)
    return {"memory": kernel.bytes(problem) / BANDWIDTH, units: 2 * kernel.macs(problem) / rate}
