"""What the kernels of the contrastive family promise."""

from collections.abc import Callable

import torch
from torch import Tensor

from gates.promises import Kernel, Operator, Problem, Unit, always, reserves_tensor_memory
from gates.records import SECTOR

FLOAT = 4  # bytes of a float32, which shares, means and their gradients are in any dtype
OPERATORS_OF = torch.ops.mlip_kernels

PROBLEMS = {
    "aligned": {"B": 2, "N": 49, "C": 8, "M": 77, "D": 128, "masked": 0},
    "odd": {"B": 2, "N": 50, "C": 9, "M": 33, "D": 33, "masked": 1},
    "long": {"B": 1, "N": 196, "C": 8, "M": 32, "D": 64, "masked": 1},
}
FULL_SIZE = {"B": 1024, "N": 49, "C": 1024, "M": 77, "D": 512, "masked": 0}
PAIR = Unit("pair", lambda p: p.B * p.C, grows=("B", "C"))


def images(p: Problem) -> Tensor:
    return p.normal(p.B, p.N, p.D)


def texts(p: Problem) -> Tensor:
    return p.normal(p.C, p.M, p.D)


def mask(p: Problem, batch: int, count: int) -> Tensor | None:
    """A mask that masks nothing, so that what is needed can be counted."""
    return torch.ones(batch, count, dtype=torch.bool) if p.masked else None


def masks(p: Problem) -> tuple[Tensor | None, Tensor | None]:
    return mask(p, p.B, p.N), mask(p, p.C, p.M)


def shares(p: Problem) -> tuple[Tensor, Tensor]:
    return p.positive(p.B, p.N), p.positive(p.C, p.M)


def winners(p: Problem) -> tuple[Tensor, Tensor]:
    shape = (p.B, p.C)
    return (torch.arange(p.N) * 7 % p.M).byte().repeat(*shape, 1), (torch.arange(p.M) * 5 % p.N).byte().repeat(
        *shape, 1
    )


def forward(p: Problem) -> tuple[Tensor, ...]:
    return OPERATORS_OF.contrastive_token_maxima(images(p), texts(p), *masks(p), *shares(p), True, False)


def backward(p: Problem) -> Tensor:
    grads = p.positive(p.B, p.C), p.positive(p.C, p.B)
    return OPERATORS_OF.contrastive_token_maxima_backward(*grads, texts(p), *masks(p), *shares(p), *winners(p))


def beside_tokens(p: Problem) -> int:
    """Means or their gradients, shares, masks and lengths, and maps of a byte."""
    per_token = (FLOAT + p.masked) * (p.B * p.N + p.C * p.M) + FLOAT * p.masked * (p.B + p.C)
    return 2 * FLOAT * p.B * p.C + per_token + p.B * p.C * (p.N + p.M)


def tokens(p: Problem) -> int:
    """Of both sides: both read by the forward pass; one read and one written by the backward pass."""
    return p.element * (p.B * p.N + p.C * p.M) * p.D


def bytes_of(p: Problem) -> int:
    return tokens(p) + beside_tokens(p)


def padding(p: Problem) -> int:
    """Bytes behind each token in the copies that Triton's kernels read where rows are no multiple of 16 channels."""
    return p.element * (-p.D % 16)


def bytes_of_padded(p: Problem) -> int:
    return bytes_of(p) + padding(p) * (p.B * p.N + p.C * p.M)


def bytes_of_padded_others(p: Problem) -> int:
    return bytes_of(p) + padding(p) * p.C * p.M


def pairs(p: Problem) -> int:
    return p.B * p.C * p.N * p.M * p.D


def terms(p: Problem) -> int:
    return p.B * p.C * (p.N + p.M) * p.D


def tensor_cores(p: Problem) -> bool:
    return p.arch >= 80


def vectors(p: Problem) -> bool:
    return p.D % 8 == 0


PAIR_PROBLEMS = {
    "aligned": {"B": 256, "C": 256, "both": 1, "smooth": 0},
    "odd": {"B": 77, "C": 77, "both": 1, "smooth": 1},
    "rows": {"B": 100, "C": 384, "both": 0, "smooth": 0},
}
PAIR_FULL_SIZE = {"B": 4096, "C": 4096, "both": 1, "smooth": 0}
LOGITS = Unit("1,024 logits", lambda p: -(-p.B * p.C // 1024), grows=("B", "C"))
TILE_ROWS = 64


def pairs_of_logits(p: Problem) -> tuple[Tensor, Tensor]:
    return p.normal(p.B, p.C), torch.arange(p.B)


def pair_forward(p: Problem) -> tuple[Tensor, ...]:
    return OPERATORS_OF.contrastive_pair_cross_entropy(*pairs_of_logits(p), bool(p.both), 0.1 * p.smooth)


def pair_backward(p: Problem) -> Tensor:
    terms = p.positive(2, p.B), p.positive(2, p.C * p.both)
    return OPERATORS_OF.contrastive_pair_cross_entropy_backward(
        torch.ones(()), *pairs_of_logits(p), *terms, bool(p.both), 0.1 * p.smooth
    )


def matrix(p: Problem) -> int:
    return p.element * p.B * p.C


def terms_and_labels(p: Problem) -> int:
    """And the loss, or its gradient."""
    return 2 * FLOAT * (p.B + p.C * p.both) + 8 * p.B + FLOAT


def triton_columns(p: Problem) -> int:
    """Of a tile; so are the next ones."""
    return 128


def cuda_columns(p: Problem) -> int:
    return 512 // p.element


def pair_partials(p: Problem, columns: int) -> int:
    """A largest logit and a sum for each line and tile, and with smoothing the distances of rows."""
    of_rows = (2 + p.smooth) * p.B * -(-p.C // columns)
    return FLOAT * (of_rows + 2 * p.both * p.C * -(-p.B // TILE_ROWS))


def own_logits(p: Problem) -> int:
    """The logits of labels, each alone in its sector."""
    return SECTOR * p.B


def line_sums(p: Problem, lines: int) -> int:
    """Four numbers in double for so many lines."""
    return 32 * (-(-p.B // lines) + p.both * -(-p.C // lines))


def pair_vectors(p: Problem) -> bool:
    return p.C % 8 == 0


def pair_forward_kernels(backend: str, columns: Callable[[Problem], int], lines: int) -> tuple[Kernel, ...]:
    name = "contrastive_pair_cross_entropy"
    return (
        Kernel(
            f"{name}_tiles_forward_kernel",
            bytes=lambda p: matrix(p) + pair_partials(p, columns(p)),
            wide_loads=pair_vectors,
            backends=(backend,),
        ),
        Kernel(
            f"{name}_finish_forward_kernel",
            bytes=lambda p: (
                pair_partials(p, columns(p)) + own_logits(p) + terms_and_labels(p) - FLOAT + line_sums(p, lines)
            ),
            backends=(backend,),
        ),
        Kernel(
            f"{name}_loss_forward_kernel",
            bytes=lambda p: line_sums(p, lines) // (1 if p.smooth else 4) + FLOAT,
            backends=(backend,),
        ),
    )


OPERATORS = (
    Operator(
        "contrastive_token_maxima",
        call=forward,
        bytes=bytes_of,
        kernels=(
            Kernel(
                "contrastive_token_maxima_kernel",
                bytes=bytes_of_padded,
                macs=pairs,
                tensor_cores=tensor_cores,
                atomics=reserves_tensor_memory,
                wide_loads=always,
                backends=("triton",),
            ),
            Kernel(
                "contrastive_token_maxima_kernel",
                bytes=bytes_of,
                macs=pairs,
                tensor_cores=tensor_cores,
                wide_loads=vectors,
                backends=("cuda",),
            ),
        ),
        problems=PROBLEMS,
        full_size=FULL_SIZE,
        unit=PAIR,
    ),
    Operator(
        "contrastive_token_maxima_backward",
        call=backward,
        bytes=bytes_of,
        kernels=(
            Kernel(
                "contrastive_token_maxima_backward_kernel",
                bytes=bytes_of_padded_others,
                macs=terms,
                tensor_cores=tensor_cores,
                atomics=reserves_tensor_memory,
                wide_loads=always,
                wide_stores=vectors,
                backends=("triton",),
            ),
            Kernel(
                "contrastive_token_maxima_backward_kernel",
                bytes=bytes_of,
                macs=terms,
                wide_loads=lambda p: vectors(p) and p.element == FLOAT,
                backends=("cuda",),
            ),
        ),
        problems=PROBLEMS,
        full_size=FULL_SIZE,
        unit=PAIR,
    ),
    Operator(
        "contrastive_pair_cross_entropy",
        call=pair_forward,
        bytes=lambda p: matrix(p) + terms_and_labels(p),
        kernels=(
            *pair_forward_kernels("triton", triton_columns, 128),
            *pair_forward_kernels("cuda", cuda_columns, 256),
        ),
        problems=PAIR_PROBLEMS,
        full_size=PAIR_FULL_SIZE,
        unit=LOGITS,
    ),
    Operator(
        "contrastive_pair_cross_entropy_backward",
        call=pair_backward,
        bytes=lambda p: 2 * matrix(p) + terms_and_labels(p),
        kernels=(
            Kernel(
                "contrastive_pair_cross_entropy_backward_kernel",
                bytes=lambda p: 2 * matrix(p) + terms_and_labels(p) - 8 * p.B,
                wide_loads=pair_vectors,
                wide_stores=pair_vectors,
            ),
            Kernel(
                "contrastive_pair_cross_entropy_targets_backward_kernel",
                bytes=lambda p: 2 * own_logits(p) + terms_and_labels(p),
            ),
        ),
        problems=PAIR_PROBLEMS,
        full_size=PAIR_FULL_SIZE,
        unit=LOGITS,
    ),
)
