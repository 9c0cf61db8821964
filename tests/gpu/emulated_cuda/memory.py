"""Device memory: allocations that a kernel cannot leave, read before they are written, or write to by mistake unseen.

Each allocation is a mapping of its own with a megabyte of nothing on either side, so an access that misses its tensor
meets no other. What a kernel may touch is exactly the bytes that a tensor's elements span. What nobody has written
reads as NaN, or as an integer far from any index.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from ptx_emulator import Buffer
from torch import Tensor

GUARD = 1 << 20
ALIGNMENT = 512  # as torch's allocator for GPUs
HOST_ALIGNMENT = 64  # as torch's allocator for CPUs
NAN, FAR = 0xFF, 0x8B  # in every byte: NaN in every floating dtype, a large negative number in every integer


@dataclass(frozen=True)
class _Allocation:
    buffer: Buffer
    mapping: weakref.ref[mmap.mmap]  # dead once the last tensor in it is


class DeviceMemory:
    """The allocations of one emulated GPU. They live as long as the tensors in them."""

    def __init__(self) -> None:
        self._allocations: dict[int, _Allocation] = {}  # by the address of the storage
        self._count = 0

    def buffers(self) -> list[Buffer]:
        """What a kernel may touch now."""
        return [allocation.buffer for allocation in self._live()]

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` lies here, or has no memory at all."""
        address = tensor.untyped_storage().data_ptr()
        allocation = self._allocations.get(address)
        return not address or not tensor.numel() or (allocation is not None and allocation.mapping() is not None)

    def put(self, tensor: Tensor, name: str = "", *, writable: bool = True, contents: bool = True) -> Tensor:
        """``tensor`` in device memory: with its strides, its offset in the storage and its alignment.

        Without ``contents``, what ``torch.empty`` would return: nothing of it is written yet.
        """
        if self.holds(tensor):
            return tensor
        self._count += 1
        name = name or f"allocation {self._count}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        source, item = tensor.untyped_storage(), tensor.element_size()
        first = tensor.storage_offset() * item
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        span = (steps + 1) * item

        mapping = mmap.mmap(-1, source.nbytes() + 2 * GUARD, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        misaligned = source.data_ptr() % HOST_ALIGNMENT
        start = GUARD + -_address(mapping) % ALIGNMENT + misaligned
        numbers = tensor.is_floating_point() or tensor.is_complex()
        storage = torch.frombuffer(mapping, dtype=torch.uint8, count=source.nbytes(), offset=start)
        storage[first : first + span] = NAN if numbers else FAR
        address = storage.data_ptr()
        self._allocations[address] = _Allocation(
            Buffer(address + first, span, name, writable=writable), weakref.ref(mapping)
        )
        placed = torch.empty(0, dtype=tensor.dtype).set_(
            storage.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        if contents:
            _distinct(placed).copy_(_distinct(tensor.detach()))
        return placed

    def _live(self) -> Iterator[_Allocation]:
        for address, allocation in list(self._allocations.items()):
            if allocation.mapping() is None:
                del self._allocations[address]
            else:
                yield allocation


def _address(mapping: mmap.mmap) -> int:
    return torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()


def _distinct(tensor: Tensor) -> Tensor:
    """Each element of memory once, where an expanded tensor has it many times."""
    for dimension, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor
