"""A time that no H100 can beat: the compulsory bytes at the full bandwidth, or the needed multiply-adds at the full
rate, whichever takes longer. It is a bound, not a prediction: launches, caches and dependencies all come on top. What
`model` says is an estimate of these.

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
    rate = TENSOR_CORES[problem.dtype] if kernel.tensor_cores(problem) else FLOAT32
    return max(kernel.bytes(problem) / BANDWIDTH, 2 * kernel.macs(problem) / rate)
