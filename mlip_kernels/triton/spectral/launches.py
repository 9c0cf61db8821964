"""How the spectral kernels are launched: sizes of tiles, programs, and the arguments that all of them share.

A program owns BLOCK_D channels and every splits-th batch element, so that it reads matrices and weights once for all of
them. There are as many programs as the GPU holds at once: with more, the later ones would only read all that again.
What changes sums, and so their last bits, depends on shapes and dtypes alone: results are the same on every GPU.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

LARGEST_GRID = 32  # points or coefficients along an axis of a grid
SHORT_LINE = 64  # points or coefficients of a token axis that is a tile
RESIDENT = 2  # programs on a multiprocessor at once: their registers allow one to three
NOT_SPECIALIZED = ("B", "prefix")  # or each size could compile the kernel anew


def fits(along_h: Tensor | None, sizes: tuple[int, int, int, int]) -> bool:
    """Whether a batch element is one tile."""
    return max(sizes) <= (SHORT_LINE if along_h is None else LARGEST_GRID)


def plan(
    x: Tensor,
    along_h: Tensor | None,
    along_w: Tensor,
    sizes: tuple[int, int, int, int],
    *,
    fourier: bool,
    exact: bool,
    crowded: bool = False,
) -> dict[str, Any]:
    """What every kernel is told, by name.

    Args:
        x: tokens or half a spectrum ``[B, ..., D]``.
        along_h, along_w: see tiles.py.
        sizes: H, W, R, K, of a map that `fits`.
        fourier: whether the map is complex.
        exact: whether products are as accurate as float32.
        crowded: whether the kernel keeps more than one spectrum in registers.
    """
    _, W, _, K = sizes
    h = along_w if along_h is None else along_h
    height, width, rows, columns = (1, _padded(W), _padded(K), 1) if along_h is None else map(_padded, sizes)
    block_d = 16
    if along_h is not None:  # as many channels as fit the registers; at least 16 bytes of each row in float32
        large, unaligned = max(height, width, rows, columns) > 16, x.shape[-1] % 4 != 0
        block_d //= (1 + (large or unaligned or crowded)) * (1 + (large and (crowded or (fourier and exact))))
    return {
        "along_h": h,
        "along_w": along_w,
        "sizes": sizes,
        "strides": (h.stride(0) if h.dim() == 3 else 0, h.stride(-2), h.stride(-1), *along_w.stride()),
        "B": x.shape[0],
        "D": x.shape[-1],
        "FOURIER": fourier,
        "GRID": along_h is not None,
        "EXACT": exact,
        "HEIGHT": height,
        "WIDTH": width,
        "ROWS": rows,
        "COLUMNS": columns,
        "BLOCK_D": block_d,
        "num_warps": 4 if along_h is None else 8,
        "maxnreg": 255,  # all there are, rather than a few spills for the sake of one more block
    }


def programs(arguments: dict[str, Any]) -> tuple[int, int]:
    """Programs side by side, and programs that share the batch on the current GPU."""
    driver = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(driver.get_current_device())
    columns = triton.cdiv(arguments["D"], arguments["BLOCK_D"])
    return columns, parts_of(arguments["B"], RESIDENT * properties["multiprocessor_count"] // columns)


def parts_of(batch: int, wanted: int) -> int:
    """At most ``wanted`` parts of the batch, and no more than it takes for the longest of them."""
    longest = triton.cdiv(batch, max(1, wanted))
    return triton.cdiv(batch, longest)


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
