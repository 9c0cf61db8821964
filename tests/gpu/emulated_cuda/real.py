"""A real GPU with the face of `EmulatedCuda`, so that one test serves both."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlip_kernels import _library

VARIABLE = "MLIP_KERNELS_CUDA_BACKEND"


class RealCuda:
    """A context in which operators on CUDA tensors run on ``backend``, ``"triton"`` or ``"cuda"``.

    Attributes:
        operators: which operators ran on a kernel, in order. Which kernels those launched, only an emulated GPU tells.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.operators: list[str] = []

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
        self._environment = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = self.backend
        self._choose = _library.cuda_kernel
        self._choose.cache_clear()
        _library.cuda_kernel = self._recording
        return self

    def __exit__(self, *error: Any) -> None:
        torch.cuda.synchronize()
        _library.cuda_kernel = self._choose
        self._choose.cache_clear()
        del os.environ[VARIABLE]
        if self._environment is not None:
            os.environ[VARIABLE] = self._environment

    def _recording(self, name: str, dtype: torch.dtype, arch: int) -> Callable[..., Any] | None:
        kernel = self._choose(name, dtype, arch)

        def run(*arguments: Any) -> Any:
            self.operators.append(name)
            return kernel(*arguments)

        return kernel and run
