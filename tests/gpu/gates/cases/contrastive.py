"""What the kernels of the contrastive family promise."""

import torch
from torch import Tensor

from gates.promises import Kernel, Operator, Problem, always, reserves_tensor_memory

FLOAT = 4  # bytes of a float32, which shares, means and their gradients are in any dtype
OPERATORS_OF = torch.ops.mlip_kernels

PROBLEMS = {
    "aligned": {"B": 2, "N": 49, "C": 8, "M": 77, "D": 128, "masked": 0},
    "odd": {"B": 2, "N": 50, "C": 9, "M": 33, "D": 33, "masked": 1},
    "long": {"B": 1, "N": 196, "C": 8, "M": 32, "D": 64, "masked": 1},
}
FULL_SIZE = {"B": 1024, "N": 49, "C": 1024, "M": 77, "D": 512, "masked": 0}


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
    ),
)
