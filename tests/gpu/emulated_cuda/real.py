"""A real GPU with the face of `EmulatedCuda`, so that one test serves both."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlip_kernels import _library

VARIABLE = "MLIP_KERNELS_CUDA_BACKEND"


@dataclass(frozen=True)
class RealLaunch:
    """One launch, as the profiler saw it."""

    kernel: str


class RealCuda:
    """A context in which operators on CUDA tensors run on ``backend``, ``"triton"`` or ``"cuda"``."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.launches: list[RealLaunch] = []

    def put(self, tensor: Tensor) -> Tensor:
        """``tensor`` on the GPU, with its strides, its offset in the storage and its ``requires_grad``."""
        storage = tensor.detach().untyped_storage().cuda()
        placed = torch.empty(0, dtype=tensor.dtype, device="cuda")
        placed.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        return placed.requires_grad_(tensor.requires_grad)

    def under(self, schedule: str, seed: int = 0) -> RealCuda:
        """Another run: a GPU has a schedule of its own."""
        return RealCuda(self.backend)

    def __enter__(self) -> RealCuda:
        self._before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = self.backend
        _library.cuda_kernel.cache_clear()
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.cuda.synchronize()
        self._profile.__exit__(*error)
        on_gpu = [e for e in self._profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        self.launches += [RealLaunch(event.name) for event in on_gpu]
        if self._before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = self._before
        _library.cuda_kernel.cache_clear()
