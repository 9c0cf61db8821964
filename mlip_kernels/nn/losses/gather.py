"""Batches spread over the ranks of ``torch.distributed``: gathered with a choice of gradient, and checked to match.

All functions use the default process group, are collective (every rank has to call them) and work on any backend
that has ``all_gather`` and ``reduce_scatter``, gloo and nccl among them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlip_kernels.ops.arguments import check_choice


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return _gathered(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Every rank holds a part of the derivative of each row: they are added in float32 or better, rounded once.
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).contiguous()
        parts = list(wide.tensor_split(dist.get_world_size()))
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts)
        return own.to(gradient.dtype)


def all_gather(tensor: Tensor, *, gradient: str = "all") -> Tensor:
    """The tensors of all ranks, which must be of one shape ``[B, ...]``, concatenated to ``[ranks·B, ...]``.

    ``gradient`` says what ``backward`` brings: ``"all"`` the sum of what every rank computed for this rank's rows
    (collective; with the mean of the losses over ranks, as DDP forms it, that is the gradient of the whole batch),
    ``"local"`` only what this rank computed for its own rows, ``"none"`` nothing. Second derivatives raise.
    """
    check_choice("gradient", gradient, ("all", "local", "none"))
    if gradient == "all":
        return _AllGather.apply(tensor)
    with torch.no_grad():
        gathered = _gathered(tensor)
    if gradient == "none" or not tensor.requires_grad:
        return gathered
    parts = list(gathered.tensor_split(dist.get_world_size()))
    parts[dist.get_rank()] = tensor
    return torch.cat(parts)


def check_process_group(rank: int, world_size: int) -> None:
    """Raise unless the default process group exists and has this rank and size."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"world_size: {world_size} needs torch.distributed; call torch.distributed.init_process_group first"
        )
    actual = dist.get_rank(), dist.get_world_size()
    if actual != (rank, world_size):
        wanted = f"{actual[0]}, {actual[1]} (those of the process group)"
        raise ValueError(f"rank, world_size: expected {wanted}, got {rank}, {world_size}")


def check_equal_on_all_ranks(sizes: dict[str, int], device: torch.device) -> None:
    """Raise on every rank if one of the named ``sizes`` differs between ranks, instead of letting them hang.

    Costs one collective of a few bytes, whose result the host reads.
    """
    mine = torch.tensor(list(sizes.values()), dtype=torch.int64, device=device)
    columns = zip(*_gathered(mine.unsqueeze(0)).tolist(), strict=True)
    for name, found in zip(sizes, columns, strict=True):
        if len(set(found)) > 1:
            raise ValueError(f"{name}: expected the same on every rank, got {list(found)} by rank")


def _gathered(tensor: Tensor) -> Tensor:
    ranks, tensor = dist.get_world_size(), tensor.contiguous()
    gathered = tensor.new_empty(ranks * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather(list(gathered.tensor_split(ranks)), tensor)
    return gathered
