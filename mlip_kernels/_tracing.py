"""What ``torch.jit.trace`` needs: while it records, the sizes of a tensor are tensors themselves."""

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
