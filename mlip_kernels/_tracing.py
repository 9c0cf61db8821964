"""What recorders of programs need of us: ``torch.jit.trace``, where sizes are tensors, and the export to ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def untraced() -> Iterator[None]:
    """Compute without being recorded by ``torch.jit.trace``: results enter its graph as constants."""
    state = torch._C._get_tracing_state()
    if state is None:
        yield
        return
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def number(value: Any) -> Any:
    """``value`` as a Python number if it is a 0-d tensor, what a size is in a trace: it becomes a constant there."""
    if not isinstance(value, Tensor):
        return value
    with untraced():
        return value.item()


def stable_argsort(values: Tensor, *, dim: int = 1, descending: bool = False) -> Tensor:
    """``values.argsort(stable=True)``: equal values stay in the order of their positions, the lowest first.

    ONNX has no stable sort. A sort becomes its TopK, which is defined to take the lower position of equal values first.
    """
    if torch.onnx.is_in_onnx_export():
        return values.sort(dim=dim, descending=descending).indices
    return values.argsort(dim=dim, descending=descending, stable=True)


def hypot(x: Tensor, y: Tensor) -> Tensor:
    """``torch.hypot``, which ONNX lacks: there it is computed without squares that overflow."""
    if not torch.onnx.is_in_onnx_export():
        return torch.hypot(x, y)
    larger, smaller = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return larger * (1 + (smaller / torch.where(larger > 0, larger, 1)).square()).sqrt()


def refuse_onnx(operator: str) -> None:
    """Raise where an operator of ours is about to enter a graph of ONNX, which has nothing like it."""
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            f"mlip_kernels::{operator} has no counterpart in ONNX; export the plain-PyTorch reference instead, by"
            " calling torch.onnx.export inside `with mlip_kernels.use_reference():`"
        )
