"""Batches spread over the ranks of ``torch.distributed``: gathered with a choice of gradient, and checked to match.

All functions use the default process group, are collective (every rank has to call them) and work on any backend
that has ``all_gather``, ``reduce_scatter``, ``all_to_all``, ``broadcast`` and ``reduce``, gloo and nccl among them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlip_kernels._arguments import check_choice


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


def all_gather_ragged(tensor: Tensor, rows: Sequence[int], *, gradient: str = "all") -> Tensor:
    """`all_gather` of tensors ``[rows[rank], ...]`` to ``[sum(rows), ...]``; all travel as long as the longest."""
    longest, own = max(rows), tensor.shape[0]
    if own < longest:
        tensor = torch.cat([tensor, tensor.new_zeros(longest - own, *tensor.shape[1:])])
    gathered = all_gather(tensor, gradient=gradient)
    if min(rows) == longest:
        return gathered
    return torch.cat([part[:count] for part, count in zip(gathered.split(longest), rows, strict=True)])


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor, source: int) -> Tensor:
        received = tensor.clone(memory_format=torch.contiguous_format)
        dist.broadcast(received, source)
        return received

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.source = inputs[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True).contiguous()
        dist.reduce(wide, ctx.source)
        return (wide if dist.get_rank() == ctx.source else torch.zeros_like(wide)).to(gradient.dtype), None


def broadcast(tensor: Tensor, source: int) -> Tensor:
    """The tensor of rank ``source`` on every rank, all being of one shape; its gradient is the sum over ranks."""
    return _Broadcast.apply(tensor, source)


class _TransposeBlocks(torch.autograd.Function):
    @staticmethod
    def forward(blocks: Tensor, rows: Sequence[int]) -> Tensor:
        return _blocks_by_column(blocks, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rows = inputs[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient.shape[0]
        sent = torch.cat([block.reshape(-1) for block in gradient.split(list(ctx.rows), 1)])
        return _all_to_all(sent, [own * count for count in ctx.rows]).view(sum(ctx.rows), own), None


def exchange_blocks(blocks: Tensor, rows: Sequence[int], *, gradient: str = "all") -> Tensor:
    """From ``[all, own]``, the columns of a square matrix that this rank has, ``[own, all]``, its rows.

    Rows and columns are spread over the ranks alike, ``rows[r]`` on rank r. Only numbers of other ranks travel, each
    once. ``gradient`` is ``"all"``, or ``"local"`` for a gradient of the block that did not travel alone.
    """
    check_choice("gradient", gradient, ("all", "local"))
    if gradient == "all":
        return _TransposeBlocks.apply(blocks, rows)
    with torch.no_grad():
        received = list(_blocks_by_column(blocks, rows).split(list(rows), 1))
    received[dist.get_rank()] = blocks.split(list(rows))[dist.get_rank()]
    return torch.cat(received, 1)


def _blocks_by_column(blocks: Tensor, rows: Sequence[int]) -> Tensor:
    own = blocks.shape[1]
    counts = [own * count for count in rows]
    received = _all_to_all(blocks.contiguous().view(-1), counts).split(counts)
    return torch.cat([part.view(own, count) for part, count in zip(received, rows, strict=True)], 1)


def _all_to_all(sent: Tensor, counts: list[int]) -> Tensor:
    """As many numbers to every rank as from it, in the order of the ranks."""
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, counts, counts)
    return received


_warned: set[str] = set()


def warn_if_local(world_size: int) -> None:
    """Say once that a loss made for one process runs in a group of several, where its negatives stay in the process."""
    if world_size > 1 or torch.compiler.is_compiling() or not (dist.is_available() and dist.is_initialized()):
        return
    ranks = dist.get_world_size()
    if ranks > 1 and "local" not in _warned:
        _warned.add("local")
        warnings.warn(
            f"mlip_kernels: a contrastive loss without rank and world_size contrasts the batch of its own process only,"
            f" but the process group has {ranks}. For the loss over the whole batch, give it"
            " rank=torch.distributed.get_rank() and world_size=torch.distributed.get_world_size().",
            stacklevel=4,
        )


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


def sizes_by_rank(sizes: dict[str, int], device: torch.device) -> dict[str, list[int]]:
    """What every rank gives under each name. Costs one collective of a few bytes, whose result the host reads."""
    mine = torch.tensor(list(sizes.values()), dtype=torch.int64, device=device)
    columns = zip(*_gathered(mine.unsqueeze(0)).tolist(), strict=True)
    return {name: list(found) for name, found in zip(sizes, columns, strict=True)}


def check_equal_on_all_ranks(by_rank: dict[str, list[int]]) -> None:
    """Raise, on every rank, if a size differs between ranks, instead of letting them hang."""
    for name, found in by_rank.items():
        if len(set(found)) > 1:
            raise ValueError(f"{name}: expected the same on every rank, got {found} by rank")


def _gathered(tensor: Tensor) -> Tensor:
    ranks, tensor = dist.get_world_size(), tensor.contiguous()
    gathered = tensor.new_empty(ranks * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather(list(gathered.tensor_split(ranks)), tensor)
    return gathered
