"""Constants of the spectral family (built in float64, rounded once, remembered) and their products with tokens."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

REMEMBERED = 256
"""How many constants are kept; the least recently used one goes first."""


def constant(build: Callable[..., Tensor], *parameters: object, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``build(*parameters, device=...)``, a float64 tensor, as ``dtype`` on ``device``.

    The result is remembered, except while something records or replaces tensors (``torch.compile``, fake tensors,
    ``torch.func``): what is built there must not outlive it, and becomes part of the graph instead.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or _inside_functorch():
        return build(*parameters, device=device).to(dtype)
    return _remembered(build, parameters, device, dtype)


@functools.lru_cache(maxsize=REMEMBERED)
def _remembered(build: Callable[..., Tensor], parameters: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    # An inference tensor could never be saved for a later backward. The CPU builds it: not every device has float64.
    with torch.inference_mode(False), torch.no_grad():
        return build(*parameters, device=torch.device("cpu")).to(device, dtype)


def _inside_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


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


def product(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix @ x`` for a constant matrix ``[M, N]`` and ``x [B, N, D]``, in the dtype of both, autocast or not."""
    return _Product.apply(matrix, x)


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
