"""Constants of the spectral family (built in float64, rounded once, remembered) and their products with tokens."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

from mlip_kernels._registration import open_library, register_fake
from mlip_kernels._tracing import untraced

LIBRARY = open_library("mlip_kernels", "FRAGMENT")

REMEMBERED_BYTES = 128 * 2**20
"""How much memory the constants may take, on all devices together; the least recently used ones go first.

The matrices of one length take at most 16 MiB (`fft_matrix` in float64, 1,024 points); those of a vision transformer
take a few hundred kilobytes.
"""


class CacheInfo(NamedTuple):
    """What is remembered, and how often it was asked for."""

    misses: int
    entries: int
    bytes: int


class Remembered:
    """Constants by their parameters, at most ``limit`` bytes of them. Any number of threads may ask at once.

    A hit takes no lock: it reads the dictionary and writes the time into its entry, each in one step.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: dict[tuple, list] = {}  # key -> [tensor, time of last use]
        self._clock = itertools.count()
        self._lock = threading.Lock()
        self._bytes = self._misses = 0

    def __call__(
        self, build: Callable[..., Tensor], parameters: tuple, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        key = (build, parameters, device, dtype)
        entry = self._entries.get(key)
        if entry is None:
            return self._keep(key, _built(*key))
        entry[1] = next(self._clock)
        return entry[0]

    def _keep(self, key: tuple, value: Tensor) -> Tensor:
        """Remember ``value`` unless another thread was faster or it alone is too large, and forget what is too much."""
        with self._lock:
            self._misses += 1
            if key in self._entries:
                return self._entries[key][0]
            size = _bytes(value)
            if size > self.limit:
                return value
            self._bytes += size
            self._entries[key] = [value, next(self._clock)]
            while self._bytes > self.limit:
                oldest = min(self._entries, key=lambda kept: self._entries[kept][1])
                self._bytes -= _bytes(self._entries.pop(oldest)[0])
            return value

    def cache_clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._bytes = self._misses = 0

    def cache_info(self) -> CacheInfo:
        """What is remembered now."""
        with self._lock:
            return CacheInfo(self._misses, len(self._entries), self._bytes)


def _built(build: Callable[..., Tensor], parameters: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    # An inference tensor could never be saved for a later backward. The CPU builds it: not every device has float64.
    # A trace would otherwise record how it is built, with sizes that are tensors there, instead of holding it.
    with torch.inference_mode(False), untraced():
        return build(*parameters, device=torch.device("cpu")).to(device, dtype)


def _bytes(value: Tensor) -> int:
    return value.untyped_storage().nbytes()


_remembered = Remembered(REMEMBERED_BYTES)


def constant(build: Callable[..., Tensor], *parameters: object, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``build(*parameters, device=...)``, a float64 tensor, as ``dtype`` on ``device``.

    The result is remembered. A graph of ``torch.compile`` fetches what is remembered through the operator that
    `fetched_by_graphs` defines; one of ``torch.export`` holds it. While something else replaces tensors (fake tensors,
    ``torch.func``), it is built there, as what is built there must not outlive it. A mode that looks on (one that
    counts flops, or decides what a checkpoint keeps) sees what is remembered, not how it was built.
    """
    if torch.compiler.is_dynamo_compiling():
        operator = getattr(torch.ops.mlip_kernels, f"spectral_{build.__name__}")
        return operator(*parameters, device=device, dtype=dtype)
    if not torch._C._are_functorch_transforms_active():
        if not is_in_torch_dispatch_mode():
            return _remembered(build, parameters, device, dtype)
        if _only_looked_on() or (torch.compiler.is_exporting() and _are_numbers(parameters)):
            with _disable_current_modes():
                return _remembered(build, parameters, device, dtype)
    return build(*parameters, device=device).to(dtype)


def _only_looked_on() -> bool:
    """Whether the modes at work leave tensors as they are: none fakes, records or functionalises them."""
    keys = torch._C._TorchDispatchModeKey
    return all(torch._C._get_dispatch_mode(key) is None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))


def _are_numbers(parameters: tuple) -> bool:
    """Whether no parameter is symbolic."""
    flat = [p for group in parameters for p in (group if isinstance(group, tuple) else (group,))]
    return not any(isinstance(p, (torch.SymInt, torch.SymFloat)) for p in flat)


def fetched_by_graphs(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorator that also defines the operator ``mlip_kernels::spectral_<name>``, the constant from memory.

    It returns a copy, because a compiler may write into what an operator returned once nobody else reads it.
    """
    name = f"spectral_{build.__name__}"
    schema = torch.library.infer_schema(build, mutates_args=()).replace(
        "Device device", "Device device, ScalarType dtype"
    )
    LIBRARY.define(name + schema)

    def fetch(*parameters: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        hashable = tuple(tuple(p) if isinstance(p, list) else p for p in parameters)
        return _remembered(build, hashable, device, dtype).clone()

    def fake(*parameters: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        return build(*parameters, device=device).to(dtype)

    LIBRARY.impl(name, fetch, "CompositeExplicitAutograd")
    register_fake(LIBRARY, name, fake)
    return build


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Half precision is widened to float32, float64 stays."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class _Product(torch.autograd.Function):
    """``matrix @ x`` that autocast does not round to half precision, neither forward nor backward.

    A context around a plain matmul protects only the forward: ``torch.compile`` traces the backward under the autocast
    of its caller, and eager mode runs it under that of ``backward()``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, x: Tensor) -> Tensor:
        with _no_autocast(x.device):
            return torch.matmul(matrix, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (matrix,) = ctx.saved_tensors
        with _no_autocast(gradient.device):
            return None, torch.matmul(matrix.t(), gradient)


class _ProductWithTangents(_Product):
    """`_Product` with forward-mode differentiation; ``torch.compile`` refuses functions that define it."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        (matrix,) = ctx.saved_tensors
        with _no_autocast(tangent.device):
            return torch.matmul(matrix, tangent)


def product(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix @ x`` for a constant matrix ``[M, N]`` and ``x [B, N, D]``, in the dtype of both, autocast or not."""
    return (_Product if torch.compiler.is_dynamo_compiling() else _ProductWithTangents).apply(matrix, x)


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
