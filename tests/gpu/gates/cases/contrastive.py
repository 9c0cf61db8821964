"""What the kernels of the contrastive family promise."""

import torch
from torch import Tensor

from gates.promises import Kernel, Operator, Problem

FLOAT = 4  # bytes of a float32, which shares, means and their gradients are in any dtype
OPERATORS_OF = torch.ops.mlip_kernels

SIZES = {
    "clip": {"B": 4, "N": 49, "C": 16, "M": 77, "real": 77, "D": 64},
    "patches": {"B": 2, "N": 196, "C": 8, "M": 32, "real": 32, "D": 64},
    "captions": {"B": 2, "N": 49, "C": 52, "M": 77, "real": 15, "D": 64},  # texts padded to 77 tokens
    "odd": {"B": 2, "N": 5, "C": 3, "M": 7, "real": 7, "D": 33},
}
FULL_SIZE = {"B": 256, "N": 49, "C": 256, "M": 77, "real": 77, "D": 256}


def text_mask(p: Problem) -> Tensor | None:
    return (torch.arange(p.M) < p.real).expand(p.C, -1) if p.real < p.M else None


def winners(p: Problem, count: int, of: int) -> Tensor:
    return torch.randint(of, (p.B, p.C, count), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def token_maxima(p: Problem) -> None:
    images, texts, shares = (
        p.normal(p.B, p.N, p.D),
        p.normal(p.C, p.M, p.D),
        (p.positive(p.B, p.N), p.positive(p.C, p.M)),
    )
    OPERATORS_OF.contrastive_token_maxima(images, texts, None, text_mask(p), *shares, True, False)


def token_maxima_backward(p: Problem) -> None:
    """Of the images."""
    maps = winners(p, p.N, p.real), winners(p, p.M, p.N)
    OPERATORS_OF.contrastive_token_maxima_backward(
        p.positive(p.B, p.C),
        p.positive(p.C, p.B),
        p.normal(p.C, p.M, p.D),
        None,
        text_mask(p),
        p.positive(p.B, p.N),
        p.positive(p.C, p.M),
        *maps,
    )


def token_bytes(p: Problem) -> int:
    return p.element * (p.B * p.N + p.C * p.real) * p.D


def other_bytes(p: Problem) -> int:
    """Shares and masks, what belongs to pairs, and the winners of real tokens."""
    masks = p.C * p.M if p.real < p.M else 0
    return FLOAT * (p.B * p.N + p.C * p.real + 2 * p.B * p.C) + masks + p.B * p.C * (p.N + p.real)


def all_bytes(p: Problem) -> int:
    return token_bytes(p) + other_bytes(p)


def tensor_cores(p: Problem) -> bool:
    return p.arch >= 80


def vectors(p: Problem) -> bool:
    return p.D % 8 == 0


OPERATORS = (
    Operator(
        "contrastive_token_maxima",
        call=token_maxima,
        bytes=all_bytes,
        kernels=(
            Kernel(
                "contrastive_token_maxima_kernel",
                bytes=all_bytes,
                macs=lambda p: p.B * p.N * p.C * p.real * p.D,
                tensor_cores=tensor_cores,
                wide_loads=vectors,
                backends=("cuda",),
            ),
        ),
        problems=SIZES,
        full_size=FULL_SIZE,
    ),
    Operator(
        "contrastive_token_maxima_backward",
        call=token_maxima_backward,
        bytes=all_bytes,
        kernels=(
            Kernel(
                "contrastive_token_maxima_backward_kernel",
                bytes=all_bytes,
                macs=lambda p: p.B * p.C * (p.N + p.real) * p.D,
                wide_loads=lambda p: vectors(p) and p.element == FLOAT,
                wide_stores=lambda p: vectors(p) and p.element == FLOAT,
                backends=("cuda",),
            ),
        ),
        problems=SIZES,
        full_size=FULL_SIZE,
    ),
)
