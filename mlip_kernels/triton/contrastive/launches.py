"""How the contrastive kernels are launched: sizes of tiles and what both passes need to know of masks.

Sizes depend on shapes and dtypes alone, and so do the bits of every result.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

SMALLEST = 16  # of either side of a product on tensor cores
ROWS = 64  # tokens of one side in a tile


def rows_of(count: int) -> int:
    """Rows of a tile for ``count`` tokens."""
    return min(ROWS, max(SMALLEST, triton.next_power_of_2(count)))


def columns_of(batch: int, count: int, columns: int) -> tuple[int, int]:
    """How many of ``batch`` sets of ``count`` tokens share a tile of ``columns``, and how many tokens of each it has.

    As many sets as there can be: what pads 77 tokens to whole tiles of 16 is 3, and a tile ends where the longest of
    its sets does.
    """
    sets = min(columns // SMALLEST, triton.next_power_of_2(batch))
    return sets, min(columns // sets, max(SMALLEST, triton.next_power_of_2(count)))


def lengths(mask: Tensor | None) -> Tensor | None:
    """``[B]`` int32, on the device: where the padding of ``mask [B, N]`` begins; 0 where nothing is real."""
    if mask is None:
        return None
    positions = torch.arange(1, mask.shape[1] + 1, dtype=torch.int32, device=mask.device)
    return torch.where(mask, positions, 0).amax(1)


def aligned(tokens: Tensor) -> Tensor:
    """``tokens [B, N, D]`` with rows that can be read 16 bytes at a time: a copy, padded by zeros, unless they can.

    One copy costs little beside the pairs of tokens, and the kernels need no second version.
    """
    padding = -tokens.shape[2] % SMALLEST
    bytes_apart = [stride * tokens.element_size() for stride in tokens.stride()[:2]]
    if padding:
        return torch.nn.functional.pad(tokens, (0, padding))
    if tokens.stride(2) != 1 or any(place % 16 for place in (tokens.data_ptr(), *bytes_apart)):
        return tokens.clone(memory_format=torch.contiguous_format)
    return tokens


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def span(tensor: Tensor, *sizes: int) -> int:
    """How far apart elements of a tile lie that has ``sizes`` of the first dimensions and all of the others."""
    return sum(
        size * stride for size, stride in zip((*sizes, *tensor.shape[len(sizes) :]), tensor.stride(), strict=True)
    )
