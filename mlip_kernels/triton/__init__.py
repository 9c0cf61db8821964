"""Triton kernels of every family and their launchers, under the names of the operators."""

from __future__ import annotations

from torch import Tensor


def with_unit_stride(x: Tensor) -> Tensor:
    """``x``, made contiguous unless its last dimension has unit stride already."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """``tensors`` as launches take them; an argument that was left out stays None."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
