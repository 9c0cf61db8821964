"""Checks of arguments, shared by every operator: each error names the argument, what came and what was wanted.

All of them look at metadata only (shape, dtype, device), so they cost no synchronisation and trace under
``torch.compile``. They run before anything is launched. The one exception is a 0-d tensor that is given where a plain
number is wanted: it is read, which synchronises where it lies on a GPU. Who looks at other values asks `values_known`
first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip_kernels._tracing import untraced

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
STRIDED = torch.strided
AUTOCAST_DEVICES = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu", "hpu", "mtia")))
"""Types of devices, asked once: a graph of ``torch.compile`` would have the question as a node."""
LARGEST_INTEGER = 2**63 - 1
"""The largest integer that operators take."""
LARGEST_SIZE = 2**31 - 1
"""The most elements along an axis, and the most tokens of a grid."""
LARGEST_NUMBER = sys.float_info.max
"""The largest finite number; comparing with it, unlike ``math.isfinite``, can be traced, and is false for NaN."""


def check_tensor(name: str, value: object, *, layout: str, dtypes: Sequence[torch.dtype] = FLOATING) -> Tensor:
    """Return ``value`` if it is a dense tensor of one of ``dtypes`` with as many dimensions as ``layout`` names.

    ``layout`` is written as in the documentation, for example ``"[B, N, D]"``; its commas are counted.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor {layout}, got {type(value).__name__}")
    if value.layout is not STRIDED or value.is_nested:
        raise _not_dense(name, value)
    dimensions = layout.count(",") + 1
    if value.dim() != dimensions:
        raise ValueError(f"{name}: expected {layout} ({dimensions} dimensions), got shape {list(value.shape)}")
    if value.dtype not in dtypes:
        raise _wrong_dtype(name, value, dtypes)
    return value


def check_tokens(name: str, value: Any) -> Tensor:
    """Return ``value`` if it is a floating-point ``[B, N, D]`` with N, D ≥ 1 (B may be 0)."""
    # What `check_tensor` asks, in fewer steps: every operator starts with this.
    right = isinstance(value, Tensor) and value.layout is STRIDED and not value.is_nested and value.dim() == 3
    if not right or value.dtype not in FLOATING:
        check_tensor(name, value, layout="[B, N, D]")
    _, count, width = value.shape
    if count < 1 or width < 1:
        raise ValueError(f"{name}: expected [B, N, D] with N, D >= 1, got shape {list(value.shape)}")
    return value


def check_shape(name: str, value: Tensor, expected: Sequence[int], layout: str) -> None:
    """Raise unless ``value`` has exactly the shape ``expected``, which ``layout`` spells in letters."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected {layout} = {list(expected)}, got shape {list(value.shape)}")


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless ``value`` lives where ``other`` does."""
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} (that of {other_name}), got {value.device}")


def check_same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless two tensors have one dtype, or autocast gives them one, as it does to all but float64."""
    if value.dtype == other.dtype:
        return
    if torch.float64 in (value.dtype, other.dtype) or not autocast_enabled(other.device.type):
        raise TypeError(f"{name}: expected dtype {other.dtype} (that of {other_name}), got {value.dtype}")


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for devices of this type."""
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def check_mask(name: str, value: object, shape: Sequence[int], layout: str, other_name: str, other: Tensor) -> Tensor:
    """Return a mask as booleans: True is a real token. In a mask of integers, that is every number but 0."""
    mask = check_tensor(name, value, layout=layout, dtypes=(torch.bool, *INTEGERS))
    check_shape(name, mask, shape, layout)
    check_same_device(name, mask, other_name, other)
    return mask if mask.dtype == torch.bool else mask != 0


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
        TypeError, ValueError: it is no tensor of this shape, dtype and device, its elements may share memory, or it is
            a negative view (what ``torch.imag`` of a conjugate is), which holds other numbers than it shows.
        RuntimeError: autograd would record the call, as where torch's own functions take ``out``.
    """
    like = inputs[0]
    checked = check_tensor(name, out, layout=layout, dtypes=(like.dtype,))
    check_shape(name, checked, shape, layout)
    if checked.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {checked.device}")
    if not checked.is_contiguous() and may_overlap(checked):
        raise ValueError(
            f"{name}: expected memory for every element, got an expanded or overlapping tensor, "
            f"strides {checked.stride()}"
        )
    if not torch.compiler.is_compiling() and checked.is_neg():
        raise ValueError(f"{name}: expected memory that holds the numbers themselves, got a negative view")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (checked, *inputs)):
        raise RuntimeError(
            f"{name}: a result that is written into a given tensor has no gradient, but one of the arguments requires"
            " one; leave it out, or call inside `with torch.no_grad():`"
        )
    return checked


def may_overlap(tensor: Tensor, *repeated: tuple[int, int]) -> bool:
    """Whether two elements of ``tensor`` may lie in one place, also if it is repeated: ``(times, elements apart)``.

    Sorted by stride, each axis has to step over all that lies within. Axes that interleave without meeting, which only
    ``as_strided`` makes, count as overlapping.
    """
    covered = 0
    axes = sorted([*zip(tensor.stride(), tensor.shape, strict=True), *((stride, times) for times, stride in repeated)])
    for stride, length in axes:
        if length > 1:
            if stride <= covered:
                return True
            covered += stride * (length - 1)
    return False


def check_integer(name: str, value: object, *, minimum: int, maximum: int | None = None) -> int:
    """Return ``value`` as an integer if it is one in ``[minimum, maximum]``; booleans are refused.

    NumPy's integers and 0-d arrays and tensors of integers are taken, too. Without ``maximum`` it has to fit in int64.
    """
    number: Any = value
    if type(value) is not int:  # as it nearly always is
        number = _number(name, value)
        if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
            raise TypeError(f"{name}: expected an integer, got {_kind(value)}")
    if number < minimum or number > (LARGEST_INTEGER if maximum is None else maximum):
        if number < minimum and maximum in (None, LARGEST_SIZE):
            wanted = f">= {minimum}"
        else:
            wanted = f"in [{minimum}, {'2**63 - 1' if maximum is None else maximum}]"
        raise ValueError(f"{name}: expected an integer {wanted}, got {shown(number)}")
    return number  # a SymInt stands for an int while tracing


def check_integers(name: str, value: object, *, minimum: int, maximum: int | None = None) -> list[int]:
    """Return a sequence of integers in ``[minimum, maximum]`` as a list; arrays and tensors of one axis are taken."""
    entries = sequence_of(value)
    if entries is None:
        raise TypeError(f"{name}: expected a sequence of integers, got {_kind(value)}")
    return [check_integer(f"{name}[{i}]", entry, minimum=minimum, maximum=maximum) for i, entry in enumerate(entries)]


def check_number(
    name: str, value: object, *, minimum: float = -LARGEST_NUMBER, maximum: float = LARGEST_NUMBER
) -> float:
    """Return ``value`` as a number if it is finite, real and in ``[minimum, maximum]``; booleans are refused.

    NumPy's numbers and 0-d arrays and tensors of numbers are taken, too, but not a tensor that requires a gradient,
    which it would not get.
    """
    number: Any = value
    if type(value) is not float:
        number = _number(name, value)
        if isinstance(number, bool) or not isinstance(number, (int, float, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{name}: expected a number, got {_kind(value)}")
    if not minimum <= number <= maximum:
        low, high = ("" if abs(bound) == LARGEST_NUMBER else f"{bound}" for bound in (minimum, maximum))
        wanted = f" in [{low}, {high}]" if low and high else f" >= {low}" if low else f" <= {high}" if high else ""
        raise ValueError(f"{name}: expected a finite number{wanted}, got {shown(number)}")
    return float(number) if type(number) is int else number


def check_scalar(name: str, value: object, other_name: str, other: Tensor) -> float | Tensor:
    """Return a finite number, or a tensor of one element as a 0-d tensor, through which gradients flow.

    The tensor is on the device of ``other``; a 0-d one may also be on the CPU.
    """
    if not isinstance(value, Tensor):
        return check_number(name, value)
    if value.layout is not STRIDED or value.is_nested:
        raise _not_dense(name, value)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {list(value.shape)}")
    if value.dtype not in (*FLOATING, *INTEGERS):
        raise _wrong_dtype(name, value, (*FLOATING, *INTEGERS))
    if value.dim():
        check_same_device(name, value, other_name, other)
        return value.reshape(())
    if value.device.type != "cpu":
        check_same_device(name, value, other_name, other)
    return value


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise unless ``value`` is one of ``choices``: texts, and None where it is among them."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {shown(value)}")


def check_flag(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False, Python's or NumPy's."""
    if value is True or value is False:
        return value
    if not isinstance(value, np.bool_):
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")
    return bool(value)


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
    height, width = _height_and_width(name, grid, " or None")
    if height * width != tokens:
        raise ValueError(
            f"{name}: expected height * width = {tokens}, the tokens that prefix_tokens leaves,"
            f" got {height} x {width} = {height * width}"
        )
    return height, width


def check_new_grid(name: str, grid: object) -> tuple[int, int]:
    """Return a grid of any size as ``(height, width)``."""
    height, width = _height_and_width(name, grid, "")
    if height * width > LARGEST_SIZE:
        raise ValueError(f"{name}: expected height * width <= {LARGEST_SIZE} tokens, got {height} x {width}")
    return height, width


def _height_and_width(name: str, grid: object, otherwise: str) -> tuple[int, int]:
    pair = grid if type(grid) is tuple else sequence_of(grid)
    if pair is None or len(pair) != 2:
        raise TypeError(f"{name}: expected (height, width){otherwise}, got {shown(grid)}")
    return (
        check_integer(f"{name}[0]", pair[0], minimum=1, maximum=LARGEST_SIZE),
        check_integer(f"{name}[1]", pair[1], minimum=1, maximum=LARGEST_SIZE),
    )


def sequence_of(value: object) -> Sequence[Any] | None:
    """A sequence, array or tensor of one axis as a sequence; None for anything else, text too."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return value
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return value.tolist()
    if isinstance(value, Tensor) and _readable(value) and value.dim() == 1:
        return value.tolist()
    return None


def _number(name: str, value: object) -> object:
    """The number that a scalar of NumPy or a 0-d array or tensor stands for; anything else as it is."""
    if isinstance(value, Tensor):
        if not _readable(value) or value.dim() != 0:
            return value
        if value.requires_grad:
            raise ValueError(f"{name}: expected a number without gradient, got a tensor that requires one")
        with untraced():  # while torch.jit.trace records, sizes are 0-d tensors
            return value.item()
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value


def _readable(value: Tensor) -> bool:
    return value.layout is STRIDED and not value.is_nested and value.device.type != "meta"


def _kind(value: object) -> str:
    """What a value is, where it is no number."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.layout is not STRIDED or value.is_nested:
        return f"a {_layout(value)} tensor"
    where = "" if value.device.type == "cpu" else f" on {value.device}"
    return f"a tensor of shape {list(value.shape)} and dtype {_letters(value.dtype)}{where}"


def shown(value: object) -> str:
    """A value as text of one line, not too long."""
    if isinstance(value, (Tensor, np.ndarray)):
        return _kind(value)
    if isinstance(value, int) and abs(value) > 10**100:
        return "an integer of more than 100 digits"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _letters(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layout(value: Tensor) -> str:
    return "nested" if value.is_nested else str(value.layout).removeprefix("torch.").removeprefix("_")


def _not_dense(name: str, value: Tensor) -> TypeError:
    remedy = f"torch.nested.to_padded_tensor({name}, 0.0)" if value.is_nested else f"{name}.to_dense()"
    return TypeError(f"{name}: expected a dense tensor, got a {_layout(value)} one; pass {remedy}")


def _wrong_dtype(name: str, value: Tensor, dtypes: Sequence[torch.dtype]) -> TypeError:
    return TypeError(f"{name}: expected dtype {', '.join(map(_letters, dtypes))}, got {_letters(value.dtype)}")


def check_grid_tokens(x: object, grid: object, prefix_tokens: object) -> tuple[Tensor, tuple[int, int] | None, int]:
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
