"""What the kernels of the merging family promise."""

import torch
from torch import Tensor

from gates.promises import Kernel, Operator, Problem

FLOAT = 4  # bytes of a float32, which weights, totals and partial sums are in any dtype

WEIGHTED_MEAN_PROBLEMS = {
    "aligned": {"B": 2, "N": 197, "D": 768, "prefix": 1, "splits": 1, "weighted": 1},
    "odd": {"B": 2, "N": 50, "D": 65, "prefix": 1, "splits": 1, "weighted": 1},
    "split": {"B": 1, "N": 1025, "D": 256, "prefix": 1, "splits": 4, "weighted": 1},
}
WITHOUT_WEIGHTS = {"unweighted": {**WEIGHTED_MEAN_PROBLEMS["aligned"], "weighted": 0}}
WEIGHTED_MEAN_FULL_SIZE = {"B": 256, "N": 197, "D": 768, "prefix": 1, "splits": 1, "weighted": 1}


def tokens(p: Problem) -> int:
    """Tokens that take part."""
    return p.B * (p.N - p.prefix)


def rows_are_vectors(p: Problem) -> bool:
    return p.D % 16 == 0


def splits(p: Problem) -> bool:
    return p.splits > 1


def weight_bytes(p: Problem) -> int:
    return FLOAT * tokens(p) * p.weighted


def sums_bytes(p: Problem) -> int:
    results = FLOAT * p.splits * p.B * (p.D + 1) if splits(p) else p.element * p.B * p.D + FLOAT * p.B
    return p.element * tokens(p) * p.D + weight_bytes(p) + results


def backward_bytes(p: Problem) -> int:
    return p.element * (p.B + p.B * p.N) * p.D + weight_bytes(p) + FLOAT * p.B


def weights(p: Problem) -> Tensor | None:
    return p.positive(p.B, p.N) if p.weighted else None


def weighted_mean(p: Problem) -> None:
    torch.ops.mlip_kernels.merging_weighted_mean(p.normal(p.B, p.N, p.D), weights(p), p.prefix)


def weighted_mean_backward(p: Problem) -> None:
    torch.ops.mlip_kernels.merging_weighted_mean_backward(
        p.normal(p.B, p.D), weights(p), p.positive(p.B), p.N, p.prefix
    )


def weighted_mean_backward_weight(p: Problem) -> None:
    torch.ops.mlip_kernels.merging_weighted_mean_backward_weight(
        p.normal(p.B, p.D), p.normal(p.B, p.N, p.D), p.positive(p.B, p.N), p.positive(p.B), p.prefix
    )


OPERATORS = (
    Operator(
        "merging_weighted_mean",
        call=weighted_mean,
        bytes=lambda p: p.element * (tokens(p) + p.B) * p.D + weight_bytes(p) + FLOAT * p.B,
        kernels=(
            Kernel(
                "weighted_mean_sums_forward_kernel",
                bytes=sums_bytes,
                macs=lambda p: tokens(p) * p.D,
                wide_loads=rows_are_vectors,
            ),
            Kernel(
                "weighted_mean_finish_forward_kernel",
                bytes=lambda p: FLOAT * p.splits * p.B * (p.D + 1) + p.element * p.B * p.D + FLOAT * p.B,
                runs=splits,
            ),
        ),
        problems=WEIGHTED_MEAN_PROBLEMS | WITHOUT_WEIGHTS,
        full_size=WEIGHTED_MEAN_FULL_SIZE,
    ),
    Operator(
        "merging_weighted_mean_backward",
        call=weighted_mean_backward,
        bytes=backward_bytes,
        kernels=(
            Kernel(
                "weighted_mean_backward_kernel",
                bytes=backward_bytes,
                wide_stores=rows_are_vectors,
            ),
        ),
        problems=WEIGHTED_MEAN_PROBLEMS | WITHOUT_WEIGHTS,
        full_size=WEIGHTED_MEAN_FULL_SIZE,
    ),
    Operator(
        "merging_weighted_mean_backward_weight",
        call=weighted_mean_backward_weight,
        bytes=lambda p: p.element * (tokens(p) + p.B) * p.D + FLOAT * (tokens(p) + p.B + p.B * p.N),
        kernels=(
            Kernel(
                "weighted_mean_products_backward_kernel",
                bytes=lambda p: p.element * (tokens(p) + p.B) * p.D + FLOAT * 2 * tokens(p),
                macs=lambda p: tokens(p) * p.D,
                wide_loads=rows_are_vectors,
            ),
            Kernel(
                "weighted_mean_centre_backward_kernel",
                bytes=lambda p: FLOAT * (2 * tokens(p) + p.B + p.B * p.N),
            ),
        ),
        problems=WEIGHTED_MEAN_PROBLEMS,
        full_size=WEIGHTED_MEAN_FULL_SIZE,
    ),
)
