"""Checks of arguments, shared by every operator: each error names the argument, what came and what was wanted.

All of them look at metadata only (shape, dtype, device), so they cost no synchronisation and trace under
``torch.compile``. They run before anything is launched. Who looks at values asks `values_known` first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: object, *, layout: str, dtypes: Sequence[torch.dtype] = FLOATING) -> Tensor:
    """Return ``value`` if it is a tensor of one of ``dtypes`` with as many dimensions as ``layout`` names.

    ``layout`` is written as in the documentation, for example ``"[B, N, D]"``; its commas are counted.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor {layout}, got {type(value).__name__}")
    dimensions = layout.count(",") + 1
    if value.dim() != dimensions:
        raise ValueError(f"{name}: expected {layout} ({dimensions} dimensions), got shape {list(value.shape)}")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {wanted}, got {str(value.dtype).removeprefix('torch.')}")
    return value


def check_tokens(name: str, value: object) -> Tensor:
    """Return ``value`` if it is a floating-point ``[B, N, D]`` with N, D ≥ 1 (B may be 0)."""
    tokens = check_tensor(name, value, layout="[B, N, D]")
    if tokens.shape[1] < 1 or tokens.shape[2] < 1:
        raise ValueError(f"{name}: expected [B, N, D] with N, D >= 1, got shape {list(tokens.shape)}")
    return tokens


def check_shape(name: str, value: Tensor, expected: Sequence[int], layout: str) -> None:
    """Raise unless ``value`` has exactly the shape ``expected``, which ``layout`` spells in letters."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected {layout} = {list(expected)}, got shape {list(value.shape)}")


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless ``value`` lives where ``other`` does."""
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} (that of {other_name}), got {value.device}")


def values_known(*tensors: Tensor | None) -> bool:
    """Whether the elements of ``tensors`` can be looked at: nothing is traced, transformed or captured for a graph."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    if any(type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta for tensor in given):
        return False
    return not (any(tensor.is_cuda for tensor in given) and torch.cuda.is_current_stream_capturing())


def check_out(name: str, out: object, shape: Sequence[int], layout: str, inputs: Sequence[Tensor]) -> Tensor:
    """Return ``out`` if a result of this shape can be written there, with the dtype and device of the first input.

    Raises:
        TypeError, ValueError: it is no tensor of this shape, dtype and device, or its elements share memory.
        RuntimeError: autograd would record the call, as where torch's own functions take ``out``.
    """
    like = inputs[0]
    checked = check_tensor(name, out, layout=layout, dtypes=(like.dtype,))
    check_shape(name, checked, shape, layout)
    if checked.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {checked.device}")
    if any(size > 1 and stride == 0 for size, stride in zip(checked.shape, checked.stride(), strict=True)):
        raise ValueError(
            f"{name}: expected memory for every element, got an expanded tensor, strides {checked.stride()}"
        )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (checked, *inputs)):
        raise RuntimeError(
            f"{name}: a result that is written into a given tensor has no gradient, but one of the arguments requires"
            " one; leave it out, or call inside `with torch.no_grad():`"
        )
    return checked


def check_integer(name: str, value: object, *, minimum: int, maximum: int | None = None) -> int:
    """Return ``value`` if it is an integer in ``[minimum, maximum]``; booleans are refused."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < minimum or (maximum is not None and value > maximum):
        wanted = f">= {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
        raise ValueError(f"{name}: expected an integer {wanted}, got {value}")
    return value  # type: ignore[return-value]  # a SymInt stands for an int while tracing


def check_number(name: str, value: object, *, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    """Return ``value`` if it is a finite real number in ``[minimum, maximum]``."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # Comparisons, unlike math.isfinite, can be traced; each is false for NaN.
    if not -math.inf < value < math.inf or value < minimum or value > maximum:
        raise ValueError(f"{name}: expected a finite number in [{minimum}, {maximum}], got {value}")
    return value  # type: ignore[return-value]


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_prefix(prefix_tokens: object, tokens: int) -> int:
    """Return the number of leading class or register tokens; at least one token must remain behind them."""
    prefix = check_integer("prefix_tokens", prefix_tokens, minimum=0)
    if prefix >= tokens:
        raise ValueError(f"prefix_tokens: expected fewer than the {tokens} tokens of x, got {prefix}")
    return prefix


def check_grid(grid: object, tokens: int, name: str = "grid") -> tuple[int, int] | None:
    """Return ``grid`` as ``(height, width)`` whose product is ``tokens``, or ``None`` for the token axis."""
    if grid is None:
        return None
    if not isinstance(grid, Sequence) or isinstance(grid, str) or len(grid) != 2:
        raise TypeError(f"{name}: expected (height, width) or None, got {grid!r}")
    height = check_integer(f"{name}[0]", grid[0], minimum=1)
    width = check_integer(f"{name}[1]", grid[1], minimum=1)
    if height * width != tokens:
        raise ValueError(
            f"{name}: expected height * width = {tokens} tokens, got {height} x {width} = {height * width}"
        )
    return height, width
