"""Checks of the arguments that only spectral operators have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlip_kernels._arguments import (
    INTEGERS,
    LARGEST_SIZE,
    check_choice,
    check_grid,
    check_integer,
    check_new_grid,
    check_out,
    check_prefix,
    check_same_device,
    check_shape,
    check_tensor,
    check_tokens,
    may_overlap,
    sequence_of,
)

Grid = tuple[int, int]

LARGEST_BAND_MATRIX = 2**30


def check_grid_tokens(x: object, grid: object, prefix_tokens: object) -> tuple[Tensor, Grid | None, int]:
    """Return tokens, grid and prefix if the grid fits the tokens behind the prefix."""
    tokens = check_tokens("x", x)
    prefix = check_prefix(prefix_tokens, tokens.shape[1])
    return tokens, check_grid(grid, tokens.shape[1] - prefix), prefix


def check_norm(norm: object) -> str:
    """Return the norm; ``None`` is another name for ``"backward"``, as in scipy and ``torch.fft``."""
    if norm is None:
        return "backward"
    check_choice("norm", norm, ("ortho", "backward", "forward"))
    return norm  # type: ignore[return-value]


def check_axis(dim: object, grid: object) -> int:
    """Return the axis of a transform: 1, the tokens, or 2, the channels. A grid lies on the token axis."""
    axis = check_integer("dim", dim, minimum=-2, maximum=2) % 3
    if axis == 0:
        raise ValueError(f"dim: expected 1 (tokens) or 2 (channels), got {dim}")
    if grid is not None and axis != 1:
        raise ValueError(f"dim: expected 1 where a grid is given, got {dim}")
    return axis


def check_dct_type(type: object, lengths: Sequence[int]) -> int:
    """Return the type of a DCT; type 1 is defined from two points on."""
    number = check_integer("type", type, minimum=1, maximum=4)
    if number == 1 and min(lengths) < 2:
        raise ValueError(f"type: 1 needs at least 2 points along each axis, got {' x '.join(map(str, lengths))}")
    return number


def check_spectrum(real: object, imag: object, n: object, grid: object) -> tuple[Tensor, Tensor, int, Grid | None]:
    """Return half a spectrum, the number of its tokens, and their grid."""
    if grid is not None:
        height, width = check_new_grid("grid", grid)
        if n is not None:
            raise ValueError(f"n: expected None where a grid is given, got {n!r}")
        layout, tokens = "[B, H, W // 2 + 1, D]", height * width
        first = check_tensor("real", real, layout=layout)
        shape = [first.shape[0], height, width // 2 + 1, first.shape[-1]]
    else:
        layout = "[B, n // 2 + 1, D]"
        first = check_tensor("real", real, layout=layout)
        tokens = 2 * (first.shape[1] - 1) if n is None else check_integer("n", n, minimum=1, maximum=LARGEST_SIZE)
        if tokens < 1:
            raise ValueError(
                f"n: expected the number of tokens, as {first.shape[1]} coefficients do not tell it, got None"
            )
        shape = [first.shape[0], tokens // 2 + 1, first.shape[-1]]
    check_shape("real", first, shape, layout)
    if first.shape[-1] < 1:
        raise ValueError(f"real: expected {layout} with D >= 1, got shape {list(first.shape)}")
    second = check_tensor("imag", imag, layout=layout, dtypes=(first.dtype,))
    check_shape("imag", second, shape, layout)
    check_same_device("imag", second, "real", first)
    return first, second, tokens, None if grid is None else (height, width)


def spectrum_shape(tokens: int, grid: Grid | None, basis: str) -> list[int]:
    """The coefficients along each axis of the spectrum of ``tokens`` tokens."""
    *leading, last = grid or (tokens,)
    return [*leading, last // 2 + 1 if basis == "rfft" else last]


def spectrum_layout(grid: Grid | None, basis: str, channels: str = "") -> str:
    """The shape of a spectrum in letters."""
    axes = ("N" if grid is None else "H, W") + (" // 2 + 1" if basis == "rfft" else "")
    return f"[{axes}{channels}]"


def argument_layout(grid: Grid | None, basis: str, channels: str = "") -> str:
    """`spectrum_layout` for an error, which says that the shape is that of a call without a grid."""
    return spectrum_layout(grid, basis, channels) + (" without a grid" if grid is None else "")


def check_filter_weight(weight: object, x: Tensor, shape: list[int], layout: str) -> Tensor:
    """Return the weight of a filter."""
    checked = check_tensor("weight", weight, layout=layout)
    check_shape("weight", checked, shape, layout)
    check_same_device("weight", checked, "x", x)
    return checked


def check_bands(bands: object, x: Tensor, shape: list[int], layout: str) -> tuple[int | Tensor, int]:
    """Return the bands, as they are, and their number; for a tensor this reads its values."""
    if isinstance(bands, Tensor) and bands.dim():
        check_tensor("bands", bands, layout=layout, dtypes=INTEGERS)
        check_shape("bands", bands, shape, layout)
        if bands.device.type != "cpu":
            check_same_device("bands", bands, "x", x)
        if bands.device.type == "meta":
            raise ValueError("bands: expected a tensor whose values can be read, got one on meta")
        lowest, highest = int(bands.min()), int(bands.max())
        if lowest < 0:
            raise ValueError(f"bands: expected band numbers from 0 on, got {lowest}")
        count = highest + 1
    else:
        bands = count = check_integer("bands", bands, minimum=1)
    coefficients = 1
    for length in shape:
        coefficients *= length
    if count * coefficients > LARGEST_BAND_MATRIX:
        raise ValueError(
            f"bands: expected bands * coefficients <= {LARGEST_BAND_MATRIX}, got {count} bands of {coefficients}"
        )
    return bands, count


def check_given_pair(out: object, shape: Sequence[int], layout: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tensors that receive real and imaginary part."""
    pair = None if isinstance(out, Tensor) else sequence_of(out)
    if pair is None or len(pair) != 2:
        count = f" of {len(pair)}" if pair is not None else ""
        raise TypeError(f"out: expected (real, imag), got a {type(out).__name__}{count}")
    real, imag = (check_out(f"out[{i}]", part, shape, layout, inputs) for i, part in enumerate(pair))
    if _share_memory(real, imag):
        raise ValueError("out: expected two tensors with memory of their own, got two that share some")
    return real, imag


def _share_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape may share an element; the two parts of a complex tensor do not."""
    if first is second:
        return True
    if torch.compiler.is_compiling() or not torch._C._is_alias_of(first, second):  # type: ignore[attr-defined]
        return False
    apart = abs(int(first.storage_offset()) - int(second.storage_offset()))
    if first.stride() == second.stride():
        return apart == 0 or may_overlap(first, (2, apart))
    earlier = first if first.storage_offset() < second.storage_offset() else second
    return apart <= sum(stride * (length - 1) for stride, length in zip(earlier.stride(), earlier.shape, strict=True))
