"""What the kernels promise that choose which tokens merge."""

import torch

from gates.promises import Condition, Formula, Kernel, Operator, Problem, reserves_tensor_memory

FLOAT, INDEX = 4, 8  # bytes of the guide and the row of a target, and of maps and scores

BACKENDS = ("triton", "cuda")
PROBLEMS = {
    "aligned": {"B": 2, "N": 197, "D": 64, "r": 16, "masked": 0},
    "odd": {"B": 2, "N": 50, "D": 65, "r": 8, "masked": 1},
    "long": {"B": 1, "N": 1200, "D": 64, "r": 300, "masked": 1},
}
FULL_SIZE = {"B": 256, "N": 197, "D": 64, "r": 16, "masked": 0}
PREFIX = 1


def match(p: Problem) -> None:
    """Of random tokens; a mask masks nothing, so that what is needed can be counted."""
    guide = p.positive(p.B, p.N) if p.masked else None
    mask = torch.ones(p.B, p.N, dtype=torch.bool) if p.masked else None
    torch.ops.mlip_kernels.merging_match(p.normal(p.B, p.N, p.D), p.r, guide, 0.5, PREFIX, mask)


def sources(p: Problem) -> int:
    return (p.N - PREFIX) // 2


def metric_bytes(p: Problem) -> int:
    """The vectors behind the prefix, the guide of sources, and the mask behind the prefix."""
    return p.B * (p.element * (p.N - PREFIX) * p.D + p.masked * (FLOAT * sources(p) + p.N - PREFIX))


def proposal_bytes(p: Problem) -> int:
    """Score and best target of each source."""
    return p.B * sources(p) * (INDEX + FLOAT)


def map_bytes(p: Problem) -> int:
    """Where each row goes and what each output row, or none, is made of; the masks of both."""
    return p.B * (2 * INDEX * p.N + p.masked * (2 * p.N - p.r))


def pairs(p: Problem) -> int:
    return p.B * sources(p) * (p.N - PREFIX - sources(p)) * p.D


def tensor_cores(p: Problem) -> bool:
    return p.arch >= 80


def vectors(p: Problem) -> bool:
    return p.D % 16 == 0


def long(p: Problem) -> bool:
    return p.N > 1024


def matching(name: str, bytes_of: Formula, runs: Condition) -> Kernel:
    """The kernel that multiplies vectors."""
    return Kernel(
        name,
        bytes=bytes_of,
        macs=pairs,
        tensor_cores=tensor_cores,
        atomics=reserves_tensor_memory,
        wide_loads=vectors,
        runs=runs,
        backends=BACKENDS,
    )


def map_kernel_bytes(p: Problem) -> int:
    return p.masked * p.B * (p.N - PREFIX) + proposal_bytes(p) + map_bytes(p)


def partner_bytes(p: Problem) -> int:
    """The target of each source that merges, which go through memory from one thread to another."""
    return 2 * FLOAT * p.B * sources(p)


def mapping(backend: str, bytes_of: Formula) -> Kernel:
    """The kernel that makes maps of proposals."""
    return Kernel("merging_match_maps_kernel", bytes=bytes_of, runs=long, backends=(backend,))


OPERATORS = (
    Operator(
        "merging_match",
        call=match,
        bytes=lambda p: metric_bytes(p) + map_bytes(p),
        kernels=(
            matching("merging_match_kernel", lambda p: metric_bytes(p) + map_bytes(p), lambda p: not long(p)),
            matching("merging_match_similarities_kernel", lambda p: metric_bytes(p) + proposal_bytes(p), long),
            mapping(
                "triton", lambda p: map_kernel_bytes(p) + 2 * FLOAT * p.B * sources(p)
            ),  # partners go through memory
            mapping("cuda", map_kernel_bytes),
        ),
        problems=PROBLEMS,
        full_size=FULL_SIZE,
    ),
)
