"""Tensors passed from rank to rank around a ring, so that each holds one shard of the batch at a time.

Collective on the default process group. Every pass is one ``batch_isend_irecv``, which neither gloo nor nccl can
deadlock on, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def pass_on(tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]], shifts: Sequence[int]) -> list[Tensor]:
    """Send each tensor ``shift`` ranks on, and return what comes from as many ranks back, of the given shape.

    What is sent and what is received has the same dtype, and may differ in shape. Nothing is sent of empty tensors.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    incoming = [t.new_empty(tuple(shape)) for t, shape in zip(tensors, shapes, strict=True)]
    sends, receives = [], []
    for outgoing, arriving, shift in zip(tensors, incoming, shifts, strict=True):
        if outgoing.numel():
            sends.append(dist.P2POp(dist.isend, _bytes_of_bool(outgoing.contiguous()), (rank + shift) % ranks))
        if arriving.numel():
            receives.append(dist.P2POp(dist.irecv, _bytes_of_bool(arriving), (rank - shift) % ranks))
    if sends or receives:
        for work in dist.batch_isend_irecv(sends + receives):
            work.wait()
    return incoming


def _bytes_of_bool(tensor: Tensor) -> Tensor:
    """The same memory, as a dtype that every backend can send."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(shifts: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(pass_on(tensors, [t.shape for t in tensors], shifts))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.shifts = inputs[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        back = [-shift for shift in ctx.shifts]
        return None, *pass_on(gradients, [g.shape for g in gradients], back)


def shift(tensors: Sequence[Tensor], shifts: Sequence[int]) -> tuple[Tensor, ...]:
    """`pass_on` of tensors whose shape is the same on all ranks; gradients travel the other way."""
    return _Shift.apply(tuple(shifts), *tensors)
