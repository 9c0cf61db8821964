"""Constants of the spectral family (built in float64, rounded once, remembered) and their products with tokens."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

from mlip_kernels._registration import open_library, register_fake

LIBRARY = open_library("mlip_kernels", "FRAGMENT")

REMEMBERED = 256
"""How many constants are kept; the least recently used one goes first."""


def constant(build: Callable[..., Tensor], *parameters: object, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``build(*parameters, device=...)``, a float64 tensor, as ``dtype`` on ``device``.

    The result is remembered. A graph of ``torch.compile`` fetches what is remembered through the operator that
    `fetched_by_graphs` defines; one of ``torch.export`` holds it. While something else records or replaces tensors
    (fake tensors, ``torch.func``), it is built there, as what is built there must not outlive it.
    """
    if torch.compiler.is_dynamo_compiling():
        operator = getattr(torch.ops.mlip_kernels, f"spectral_{build.__name__}")
        return operator(*parameters, device=device, dtype=dtype)
    if not torch._C._are_functorch_transforms_active():
        if torch.compiler.is_exporting() and _are_numbers(parameters):
            with _disable_current_modes():
                return _remembered(build, parameters, device, dtype)
        if not is_in_torch_dispatch_mode():
            return _remembered(build, parameters, device, dtype)
    return build(*parameters, device=device).to(dtype)


@functools.lru_cache(maxsize=REMEMBERED)
def _remembered(build: Callable[..., Tensor], parameters: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    # An inference tensor could never be saved for a later backward. The CPU builds it: not every device has float64.
    with torch.inference_mode(False):
        return build(*parameters, device=torch.device("cpu")).to(device, dtype)


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
