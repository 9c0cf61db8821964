"""`EmulatedCuda`: inside it, the operators of this package called on CPU tensors run as they would on a GPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from ptx_emulator import Emulator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from emulated_cuda import cuda_library
from emulated_cuda.cuda_library import CudaLibrary
from emulated_cuda.launch import (
    INVALID_VALUE,
    LAUNCH_FAILURE,
    MOST_SHARED,
    MULTIPROCESSOR_COUNT,
    Compiled,
    LaunchError,
    LaunchRecord,
    attributes,
    check_configuration,
    check_shared,
)
from emulated_cuda.memory import DeviceMemory
from mlip_kernels import _library

Size = tuple[int, int, int]
Values = Callable[[Sequence[int]], Sequence[bytes]]
"""The arguments of a launch: given how many bytes each parameter of the kernel has, their bytes."""

BACKENDS = ("triton", "cuda")
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
UNWRITTEN = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
"""Operators of torch whose results nobody has written yet."""


class EmulatedCuda(TorchDispatchMode):
    """A context in which CPU tensors are computed on by the GPU kernels of ``backend``, emulated.

    Every operator of `mlip_kernels` called inside copies its arguments into device memory, runs the launcher that a
    CUDA tensor would run, and returns ordinary CPU tensors. What a launcher allocates lies in device memory too.
    Gradients work: backward passes that run inside are operators like any other.

    Args:
        backend: ``"triton"`` or ``"cuda"`` (CUDA C++), as in ``MLIP_KERNELS_CUDA_BACKEND``.
        arch: 80 or 90; without ``execute`` also 100 and 120.
        schedule: in which order warps run: ``"round_robin"``, ``"reversed"`` or ``"random"``.
        seed: of the random schedule.
        execute: if false, kernels are compiled and launches recorded, but results stay NaN.
        multiprocessors: how many launchers are told that the device has.
        sized_as: the architecture whose shared memory these launchers find, where it is not ``arch``.
        sources: CUDA C++ files whose kernels are to be taken from another one, ``{file under csrc/cuda: other file}``.

    Attributes:
        operators: which operators ran on a kernel, in order.
        launches: which kernels they launched, in order.

    Raises (from the operator's call):
        ptx_emulator.EmulatorError: a kernel did what it must not, or uses an instruction that cannot be emulated.
        LaunchError: a launch that no GPU would start.
    """

    def __init__(
        self,
        backend: str,
        arch: int,
        *,
        schedule: str = "round_robin",
        seed: int = 0,
        execute: bool = True,
        multiprocessors: int = MULTIPROCESSOR_COUNT,
        sized_as: int | None = None,
        sources: dict[str, Path] | None = None,
    ) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
        self.backend, self.arch, self.schedule, self.seed, self.execute = backend, arch, schedule, seed, execute
        self.multiprocessors, self.sized_as = multiprocessors, sized_as or arch
        self.attributes = attributes(self.sized_as, multiprocessors)
        self.operators: list[str] = []
        self.launches: list[LaunchRecord] = []
        self._emulator = Emulator(arch, schedule=schedule, seed=seed) if execute else None
        self._sources = sources or {}
        self._memory: DeviceMemory | None = None  # while an operator runs
        self._failure: BaseException | None = None  # of a launch by code that knows no exceptions
        self._active = ExitStack()
        self._depth = 0

    @property
    def compiled(self) -> dict[str, list[Compiled]]:
        """What was launched at least once, by the kernel's name: one entry for each specialisation."""
        kernels: dict[str, list[Compiled]] = {}
        for record in self.launches:
            versions = kernels.setdefault(record.kernel, [])
            if record.compiled not in versions:
                versions.append(record.compiled)
        return kernels

    def put(self, tensor: Tensor) -> Tensor:
        """``tensor`` itself: operators copy it when they run. On a GPU, `RealCuda.put` copies it here and now."""
        return tensor

    def under(self, schedule: str, seed: int = 0) -> EmulatedCuda:
        """The same device with another schedule."""
        return EmulatedCuda(
            self.backend,
            self.arch,
            schedule=schedule,
            seed=seed,
            execute=self.execute,
            multiprocessors=self.multiprocessors,
            sized_as=self.sized_as,
            sources=self._sources,
        )

    def __enter__(self) -> EmulatedCuda:
        if self._depth == 0:
            self._active.enter_context(self._backend_installed())
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if self._depth == 0:
            self._active.close()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == _library.LIBRARY.ns:
            return self._operator(function, args, kwargs or {})
        results = function(*args, **(kwargs or {}))
        if self._memory is None:
            return results
        written = function.overloadpacket.__name__ not in UNWRITTEN
        return tree_map_only(Tensor, lambda result: self._memory.put(result, contents=written), results)

    def _operator(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        name, declared = function.overloadpacket.__name__, function._schema.arguments
        rest = [kwargs.get(argument.name, argument.default_value) for argument in declared[len(args) :]]
        arguments = (*args, *rest)  # torch leaves out here what equals its default
        if not _library.has_kernels(name):
            with self:  # it calls operators that have
                return function.redispatch(CPU, *arguments)
        if not _library.kernels_take(arguments):
            return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *arguments)
        kernel, reason = self._find(name)
        if kernel is None:
            raise RuntimeError(f"{name} cannot run on {self.backend}: {reason}")
        self.operators.append(name)
        mutable = [a.name for a in declared if a.alias_info is not None and a.alias_info.is_write]
        return self.run(kernel, *arguments, names=[a.name for a in declared], written=mutable)

    def run(
        self, launcher: Callable[..., Any], *arguments: Any, names: Sequence[str] = (), written: Sequence[str] = ()
    ) -> Any:
        """Call any launcher with ``arguments`` in device memory; its results come back as ordinary tensors.

        Args:
            launcher: launches kernels on the tensors it is given, through Triton or a `cuda_library.CudaLibrary`.
            names: of the arguments, as faults report them.
            written: which of them kernels may write to; the tensors that were passed then hold what they wrote.
        """
        names = [*names, *(f"argument {number}" for number in range(len(names), len(arguments)))]
        outer, self._memory = self._memory, self._memory or DeviceMemory()
        try:
            with _disable_current_modes():
                placed = [
                    tree_map_only(
                        Tensor, functools.partial(self._memory.put, name=name, writable=name in written), value
                    )
                    for name, value in zip(names, arguments, strict=True)
                ]
            with self:
                results = self._call(launcher, placed)
            with _disable_current_modes(), torch.no_grad():
                for name, value, copy in zip(names, arguments, placed, strict=True):
                    if name in written and copy is not value:
                        value.copy_(copy)
                return tree_map_only(Tensor, torch.clone, results)
        finally:
            self._memory = outer

    def _call(self, launcher: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """Call a launcher; a launch that failed inside compiled code is raised as what it was."""
        self._failure = None
        try:
            results = launcher(*arguments)
        except RuntimeError as error:
            if self._failure is None:
                raise
            raise self._failure from error
        if self._failure is not None:
            raise AssertionError("a launch failed and its launcher did not ask (check_launch)") from self._failure
        return results

    def _find(self, name: str) -> tuple[Callable[..., Any] | None, str]:
        return _library._find_triton(name) if self.backend == "triton" else cuda_library.operator(name)

    @contextmanager
    def _backend_installed(self) -> Iterator[None]:
        if self.backend == "triton":
            from emulated_cuda import triton_driver

            with triton_driver.installed(self.arch, self.multiprocessors, self._launch):
                yield
        else:
            before = cuda_library.connect(self)
            try:
                yield
            finally:
                cuda_library.connect(before)

    def _launch(self, compiled: Compiled, grid: Size, block: Size, shared: int, values: Values) -> None:
        """Check, execute and record one launch."""
        check_configuration(compiled.kernel, grid, block)
        statistics, opcodes = None, {}
        if self._emulator is not None:
            program = self._emulator.load(compiled.ptx)
            kernel = program.kernels[compiled.kernel]
            if self.backend == "cuda":
                allowed = cuda_library.allowed_shared.get(compiled.kernel, 0)
                check_shared(compiled.kernel, self.arch, static=kernel.static_shared, dynamic=shared, allowed=allowed)
            parameters = bytearray(kernel.parameter_bytes)
            sizes = [parameter.size for parameter in kernel.parameters]
            for parameter, value in zip(kernel.parameters, values(sizes), strict=True):
                if len(value) != parameter.size:
                    raise ValueError(f"{kernel.name}: {len(value)} bytes for {parameter.name}, a {parameter.type}")
                parameters[parameter.offset : parameter.offset + parameter.size] = value
            buffers = self._memory.buffers() if self._memory is not None else []
            done = self._emulator.launch(
                program, compiled.kernel, grid, block, bytes(parameters), shared=shared, buffers=buffers
            )
            statistics, opcodes = done.statistics, done.opcodes
        self.launches.append(LaunchRecord(compiled, self.backend, grid, block, shared, statistics, opcodes))

    def launch(
        self,
        library: CudaLibrary,
        kernel: str,
        grid: Size,
        block: Size,
        shared: int,
        parameters: cuda_library.Pointers,
    ) -> int:
        """What the CUDA runtime calls to launch a kernel."""
        if self._failure is not None:
            return LAUNCH_FAILURE  # nothing runs on a GPU after a fault
        try:
            compiled = self._compiled_by_nvcc(library, kernel)
            self._launch(compiled, grid, block, shared, functools.partial(_values, parameters))
        except BaseException as failure:  # raised again by `_call`, behind the compiled code
            self._failure = failure
            return failure.code if isinstance(failure, LaunchError) else LAUNCH_FAILURE
        return 0

    def allow(self, kernel: str, dynamic_shared: int) -> int:
        """What the CUDA runtime calls when a launcher asks for more shared memory than every kernel may have."""
        if dynamic_shared > MOST_SHARED[self.sized_as]:
            return INVALID_VALUE
        cuda_library.allowed_shared[kernel] = dynamic_shared
        return 0

    def _compiled_by_nvcc(self, library: CudaLibrary, kernel: str) -> Compiled:
        for source, text in library.ptx(self.arch).items():
            if f".entry {kernel}(" in text:
                changed = self._sources.get(source)
                return Compiled(kernel, self.arch, cuda_library.compile_ptx(changed, self.arch) if changed else text)
        raise KeyError(f"no kernel {kernel} in the PTX of {library.name}")


def _values(parameters: cuda_library.Pointers, sizes: Sequence[int]) -> list[bytes]:
    return [ctypes.string_at(parameters[number], size) for number, size in enumerate(sizes)]
