"""The processes of a run: one alone, or those that ``torchrun`` started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


class OtherProcessError(RuntimeError):
    """Another process of the run failed, which reports why; this one ends with it."""


class _Place(NamedTuple):
    """Where a tensor goes in a broadcast value."""

    shape: torch.Size
    dtype: torch.dtype


class Processes(NamedTuple):
    """Place of this process among all of a run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the processes."""
        if self.world_size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.world_size

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds in any process."""
        if self.world_size == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def all_of(self, value: T) -> list[T]:
        """The plain value of every process, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """The result of ``work``, if it succeeds in all processes; otherwise every one of them raises.

        Raises:
            OtherProcessError: if ``work`` failed elsewhere only. Where it failed, its own error.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        failed = [rank for rank, fails in enumerate(self.all_of(failure is not None)) if fails]
        if failure is not None:
            raise failure
        if failed:
            raise OtherProcessError(f"process {failed[0]} of {self.world_size} failed")
        return result  # type: ignore[return-value]  # without a failure it is what work returned

    def from_first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in the first process, alone called there, in all: nested tensors and plain values.

        Tensors arrive on the CPU. An error in the first process ends the others as in `together`.
        """
        result: Any = self.together(lambda: work() if self.leads else None)
        if self.world_size == 1:
            return result
        tensors: list[Tensor] = []

        def leave_out(tensor: Tensor) -> _Place:
            tensors.append(tensor)
            return _Place(tensor.shape, tensor.dtype)

        def receive(place: _Place) -> Tensor:
            received = tensors.pop(0) if self.leads else torch.empty(place.shape, dtype=place.dtype)
            travelling = received.to(self.device).contiguous()
            dist.broadcast(travelling, 0)
            return received if self.leads else travelling.cpu()

        plan = [_map(result, Tensor, leave_out)]
        dist.broadcast_object_list(plan)
        return _map(plan[0], _Place, receive)


def _map(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """``value`` with everything of one kind in its dicts, lists and tuples replaced."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        return type(value)((key, _map(item, kind, function)) for key, item in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, kind, function) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, kind, function) for item in value)
    return value


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the process group that ``torchrun`` describes (gloo on CPU, nccl on GPU), or be the only process.

    Raises:
        ValueError: if ``device`` is ``cuda`` and PyTorch sees no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a visible GPU for 'cuda', got none; use --device cpu")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    if world_size == 1:
        yield Processes(0, 1, place)
        return
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Processes(rank, world_size, place)
    finally:
        dist.destroy_process_group()
