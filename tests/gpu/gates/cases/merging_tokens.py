"""What the kernels of token merging promise: matching, merging, and copying back."""

import torch
from torch import Tensor

from gates.promises import Kernel, Operator, Problem
from mlip_kernels.reference import merging as reference

BACKENDS = ("cuda",)
FLOAT, INDEX = 4, 8  # bytes of a float32, which weights and sizes are in any dtype, and of a row number
OPERATORS_OF = torch.ops.mlip_kernels
ONE_LAUNCH = 1024  # tokens up to which one kernel matches

MATCH_PROBLEMS = {
    "aligned": {"B": 2, "N": 197, "D": 64, "r": 16, "prefix": 1},
    "few tokens": {"B": 4, "N": 50, "D": 768, "r": 8, "prefix": 1},
    "odd": {"B": 1, "N": 180, "D": 33, "r": 80, "prefix": 2},
    "long": {"B": 1, "N": 1100, "D": 32, "r": 500, "prefix": 0},
}
MATCH_FULL_SIZE = {"B": 256, "N": 197, "D": 64, "r": 16, "prefix": 1}
ROWS_PROBLEMS = {
    "aligned": {"B": 2, "N": 197, "C": 768, "r": 16, "weighted": 1},
    "many pairs": {"B": 1, "N": 197, "C": 768, "r": 98, "weighted": 1},
    "odd": {"B": 2, "N": 50, "C": 65, "r": 8, "weighted": 1},
}
WITHOUT_WEIGHTS = {"unweighted": {**ROWS_PROBLEMS["aligned"], "weighted": 0}}
ROWS_FULL_SIZE = {"B": 256, "N": 197, "C": 768, "r": 16, "weighted": 1}


def one_launch(p: Problem) -> bool:
    return p.N <= ONE_LAUNCH


def two_launches(p: Problem) -> bool:
    return not one_launch(p)


def sources(p: Problem) -> int:
    return (p.N + 1) // 2 - (p.prefix + 1) // 2


def targets(p: Problem) -> int:
    return p.N // 2 - p.prefix // 2


def pairs(p: Problem) -> int:
    return p.B * sources(p) * targets(p) * p.D


def metric_bytes(p: Problem) -> int:
    return p.element * p.B * (p.N - p.prefix) * p.D


def map_bytes(p: Problem) -> int:
    """The output row of every input row, and of every row its place among those that are kept or removed."""
    return 2 * INDEX * p.B * p.N


def proposal_bytes(p: Problem) -> int:
    return (INDEX + FLOAT) * p.B * sources(p)


def match(p: Problem) -> None:
    OPERATORS_OF.merging_match(p.normal(p.B, p.N, p.D), p.r, None, 1.0, p.prefix, None)


def maps(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    assignment, kept, removed, _, _ = reference.match(p.normal(p.B, p.N, 8), p.r)
    return assignment, kept, removed


def weights(p: Problem) -> Tensor | None:
    return p.positive(p.B, p.N) if p.weighted else None


def row_bytes(p: Problem) -> int:
    return p.element * p.B * (2 * p.N - p.r) * p.C


def given_bytes(p: Problem) -> int:
    return FLOAT * p.B * p.N * p.weighted


def combine_bytes(p: Problem) -> int:
    """Rows, weights, where output rows start, and what is merged into them."""
    return row_bytes(p) + given_bytes(p) + INDEX * p.B * (p.N - p.r + 2 * p.r)


def merge_bytes(p: Problem) -> int:
    return combine_bytes(p) + FLOAT * p.B * (2 * p.N - p.r)


def spread_bytes(p: Problem) -> int:
    return row_bytes(p) + given_bytes(p) + INDEX * p.B * p.N


def merge(p: Problem) -> None:
    OPERATORS_OF.merging_merge(p.normal(p.B, p.N, p.C), weights(p), *maps(p), None, None)


def combine(p: Problem) -> None:
    OPERATORS_OF.merging_combine(p.normal(p.B, p.N, p.C), weights(p), *maps(p), None)


def spread(p: Problem) -> None:
    OPERATORS_OF.merging_spread(p.normal(p.B, p.N - p.r, p.C), weights(p), *maps(p), None)


def tensor_cores(p: Problem) -> bool:
    return p.arch >= 80


def rows_are_vectors(p: Problem) -> bool:
    return p.C % 8 == 0


def metric_is_vectors(p: Problem) -> bool:
    return p.D % 8 == 0


def of_rows(name, call, needed):
    """An operator that moves rows by one kernel."""
    kernel = Kernel(
        f"{name}_kernel", bytes=needed, wide_loads=rows_are_vectors, wide_stores=rows_are_vectors, backends=BACKENDS
    )
    return Operator(
        name,
        call=call,
        bytes=needed,
        kernels=(kernel,),
        problems=ROWS_PROBLEMS | WITHOUT_WEIGHTS,
        full_size=ROWS_FULL_SIZE,
    )


OPERATORS = (
    Operator(
        "merging_match",
        call=match,
        bytes=lambda p: metric_bytes(p) + map_bytes(p),
        kernels=(
            Kernel(
                "merging_match_kernel",
                bytes=lambda p: metric_bytes(p) + map_bytes(p),
                macs=pairs,
                tensor_cores=tensor_cores,
                wide_loads=metric_is_vectors,
                runs=one_launch,
                backends=BACKENDS,
            ),
            Kernel(
                "merging_match_similarities_kernel",
                bytes=lambda p: metric_bytes(p) + proposal_bytes(p),
                macs=pairs,
                tensor_cores=tensor_cores,
                wide_loads=metric_is_vectors,
                runs=two_launches,
                backends=BACKENDS,
            ),
            Kernel(
                "merging_match_maps_kernel",
                bytes=lambda p: proposal_bytes(p) - FLOAT * p.B * (sources(p) - p.r) + map_bytes(p),
                runs=two_launches,
                backends=BACKENDS,
            ),
        ),
        problems=MATCH_PROBLEMS,
        full_size=MATCH_FULL_SIZE,
    ),
    of_rows("merging_merge", merge, merge_bytes),
    of_rows("merging_combine", combine, combine_bytes),
    of_rows("merging_spread", spread, spread_bytes),
)
