"""Kinds of arguments, values that someone might give for one, and which of them each kind accepts."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LARGEST_INTEGER = 2**63 - 1
LARGEST_SIZE = 2**31 - 1
LARGEST_NUMBER = sys.float_info.max
LARGEST_TRIED = 2**20
"""The largest edge of a range that is tried: what a call allocates may grow with it."""


def plain(value: Any) -> Any:
    """The Python number that a NumPy scalar, a 0-d array or a 0-d tensor stands for; anything else as it is."""
    if isinstance(value, Tensor):
        dense = value.layout is torch.strided and not value.is_nested and value.device.type != "meta"
        return value.item() if dense and value.dim() == 0 and not value.requires_grad else value
    return value.item() if isinstance(value, np.generic | np.ndarray) and value.ndim == 0 else value


def is_integer(value: Any, minimum: float, maximum: float) -> bool:
    value = plain(value)
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def is_number(value: Any, minimum: float, maximum: float) -> bool:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return max(minimum, -LARGEST_NUMBER) <= value <= min(maximum, LARGEST_NUMBER)


class Kind:
    """What an argument has to be."""

    optional = False
    """Whether None is a value."""

    def accepts(self, label: str, value: Any) -> bool:
        """Whether ``value`` is a right one; a variant of the tensor in the valid call is told by its ``label``."""
        raise NotImplementedError

    def values(self) -> dict[str, Any]:
        """Values at the edges of what is accepted."""
        return {}


@dataclass(frozen=True)
class Integer(Kind):
    minimum: int
    maximum: int = LARGEST_INTEGER
    optional: bool = False

    def accepts(self, label: str, value: Any) -> bool:
        return is_integer(value, self.minimum, self.maximum)

    def values(self) -> dict[str, Any]:
        near = {"minimum": self.minimum, "below the minimum": self.minimum - 1}
        if self.maximum <= LARGEST_TRIED:
            near |= {"maximum": self.maximum, "above the maximum": self.maximum + 1}
        return near


@dataclass(frozen=True)
class Number(Kind):
    minimum: float = -math.inf
    maximum: float = math.inf
    optional: bool = False

    def accepts(self, label: str, value: Any) -> bool:
        return is_number(value, self.minimum, self.maximum)

    def values(self) -> dict[str, Any]:
        edges = {"minimum": self.minimum, "maximum": self.maximum}
        near = {"minimum": math.nextafter(self.minimum, -math.inf), "maximum": math.nextafter(self.maximum, math.inf)}
        finite = [name for name, value in edges.items() if abs(value) <= LARGEST_TRIED]
        return {name: edges[name] for name in finite} | {f"beyond the {name}": near[name] for name in finite}


@dataclass(frozen=True)
class Choice(Kind):
    choices: tuple[Any, ...]

    def accepts(self, label: str, value: Any) -> bool:
        return (value is None or isinstance(value, str)) and value in self.choices

    def values(self) -> dict[str, Any]:
        return {f"choice {choice}": choice for choice in self.choices}


@dataclass(frozen=True)
class Flag(Kind):
    only: tuple[bool, ...] = (False, True)

    def accepts(self, label: str, value: Any) -> bool:
        return isinstance(value, bool | np.bool_) and bool(value) in self.only


@dataclass(frozen=True)
class Numbers(Kind):
    """A sequence of ``length`` numbers, each right for ``entry``, that goes together as ``fits`` says."""

    entry: Kind
    length: int | None = None
    fits: Callable[[Sequence[Any]], bool] = lambda values: True
    single: Kind | None = None
    """What else it may be: one number."""
    optional: bool = False
    wrong: tuple[Any, ...] = ()

    def accepts(self, label: str, value: Any) -> bool:
        if self.single is not None and self.single.accepts(label, value):
            return True
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.is_nested or value.device.type == "meta":
                return False
            if value.dim() != 1 or value.requires_grad or value.is_complex():
                return False
            value = value.tolist()
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if not isinstance(value, list | tuple | range) or self.length not in (None, len(value)):
            return False
        return all(self.entry.accepts(label, entry) for entry in value) and self.fits([plain(e) for e in value])

    def values(self) -> dict[str, Any]:
        return {f"wrong {number}": value for number, value in enumerate(self.wrong)}


@dataclass(frozen=True)
class Rate(Kind):
    """What ToMe takes: an integer, a pair of an integer and an inflection, or integers that are no tuple."""

    def accepts(self, label: str, value: Any) -> bool:
        if isinstance(value, tuple):
            return len(value) == 2 and is_integer(value[0], 0, LARGEST_INTEGER) and is_number(value[1], -1.0, 1.0)
        return Numbers(Integer(0), single=Integer(0)).accepts(label, value)


@dataclass(frozen=True)
class Tensors(Kind):
    """A tensor of the shape in the valid call."""

    dtypes: tuple[torch.dtype, ...] = FLOATING
    optional: bool = False
    free: tuple[str, ...] = ()
    """Labels of variants with another shape, device or dtype that are right here."""
    same_dtype: bool = False
    """Whether other arguments have to share its dtype."""
    gradient: bool = True
    single: Kind | None = None
    """What else it may be: one number."""

    def accepts(self, label: str, value: Any) -> bool:
        if self.single is not None and label in GENERIC and self.single.accepts(label, value):
            return True
        if label in ("another dtype", "boolean", "integers", "float8", "complex", "quantised"):
            return value.dtype in self.dtypes and (not self.same_dtype or label in self.free)
        if label == "requires a gradient":
            return self.gradient
        return label in ("not contiguous", "expanded", "negative view") or label in self.free


@dataclass(frozen=True)
class Scalar(Kind):
    """A number, or a tensor of one element."""

    optional: bool = False

    def accepts(self, label: str, value: Any) -> bool:
        if isinstance(value, Tensor):
            dense = value.layout is torch.strided and not value.is_nested and value.device.type != "meta"
            return dense and value.numel() == 1 and (value.dtype in FLOATING or value.dtype in INTEGERS)
        return is_number(value, -math.inf, math.inf)


@dataclass(frozen=True)
class Instance(Kind):
    """Something of the class of the value in the valid call."""

    optional: bool = False

    def accepts(self, label: str, value: Any) -> bool:
        return False


GENERIC: dict[str, Any] = {
    "None": None,
    "True": True,
    "np.True_": np.True_,
    "text": "two",
    "empty text": "",
    "bytes": b"2",
    "1.5": 1.5,
    "-1.5": -1.5,
    "NaN": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "complex number": 1j,
    "-1": -1,
    "0": 0,
    "1": 1,
    "beyond int32": 2**62,
    "beyond int64": 2**64,
    "beyond float": 10**400,
    "beyond text": 10**5000,
    "below float": -(10**400),
    "np.int64": np.int64(2),
    "np.uint8": np.uint8(1),
    "np.float32": np.float32(0.5),
    "np.float64": np.float64(0.5),
    "np.float32 NaN": np.float32(math.nan),
    "np.str_": np.str_("two"),
    "np.datetime64": np.datetime64("2026-01-01"),
    "0-d array": np.array(1),
    "array of integers": np.array([2, 3]),
    "array of numbers": np.array([0.5, 0.25]),
    "[]": [],
    "[None]": [None],
    "[2]": [2],
    "[2, 3]": [2, 3],
    "(2, 3)": (2, 3),
    "(2.0, 3.0)": (2.0, 3.0),
    "(2, -3)": (2, -3),
    "(True, 6)": (True, 6),
    "(1, 2, 3)": (1, 2, 3),
    "(NaN, 0.5)": (math.nan, 0.5),
    "(0.5, 0.25)": (0.5, 0.25),
    "('2', '3')": ("2", "3"),
    "{}": {},
    "{2, 3}": {2, 3},
    "object": object(),
    "function": len,
    "class": int,
    "range": range(2),
    "0-d tensor of an integer": torch.tensor(1),
    "0-d tensor of a number": torch.tensor(0.5),
    "0-d tensor that requires a gradient": torch.tensor(0.5, requires_grad=True),
    "0-d tensor of a truth value": torch.tensor(True),
    "0-d tensor on meta": torch.tensor(0.5, device="meta"),
    "tensor of one integer": torch.tensor([2]),
    "tensor of one number": torch.tensor([0.5]),
    "tensor of integers": torch.tensor([2, 3]),
    "tensor of five dimensions": torch.ones(1, 1, 2, 1, 1),
    "tensor of nothing": torch.ones(0),
    "sparse tensor": torch.eye(2).to_sparse(),
}
"""Values that are tried for every argument."""


def variants(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What else a tensor that is right could have been, by label."""
    t = tensor.detach()
    yield "meta", t.to("meta")
    yield "sparse COO", t.to_sparse()
    if t.dim() >= 2:
        yield "sparse CSR", torch.ones_like(t, dtype=torch.float32).to_sparse_csr()
    if t.dim() >= 1 and len(t):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield "nested", torch.nested.nested_tensor(list(t))
            if t.dim() >= 2:
                yield "nested, jagged", torch.nested.nested_tensor(list(t), layout=torch.jagged)
            yield "quantised", torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)
    yield "MKL-DNN", t.float().to_mkldnn()
    yield "complex", t.to(torch.complex64)
    yield "boolean", t.bool()
    yield "integers", t.to(torch.int32)
    yield "float8", t.to(torch.float8_e4m3fn)
    yield "another dtype", t.to(torch.float64 if t.dtype != torch.float64 else torch.float16)
    yield "one more dimension", t[None]
    yield "one less dimension", t[0] if t.dim() and len(t) else t.new_ones(2, 2)
    for axis, length in enumerate(t.shape):
        yield f"longer along {axis}", torch.cat([t, t.narrow(axis, 0, 1)], axis) if length else t
        yield f"nothing along {axis}", t.narrow(axis, 0, 0)
        yield f"shorter along {axis}", t.narrow(axis, 0, max(length - 1, 0))
    yield "not contiguous", t.clone().transpose(0, -1).contiguous().transpose(0, -1)
    if t.is_floating_point():
        yield "negative view", (-t)._neg_view()
        yield "requires a gradient", t.clone().requires_grad_()


def wrong_and_right(valid: Any, kind: Kind) -> Iterator[tuple[str, Any]]:
    """Everything that is tried for an argument."""
    yield from GENERIC.items()
    yield from kind.values().items()
    if isinstance(valid, Tensor):
        yield from variants(valid)
        yield "nested list", valid.tolist()
        yield "array", valid.detach().float().numpy()
