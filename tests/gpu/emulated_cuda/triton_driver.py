"""A Triton driver whose GPU is emulated: ``kernel[grid](...)`` compiles as for a real one, then runs on the emulator.

Triton finds its driver in ``triton.runtime.driver``; `installed` puts one of these there and puts back what was there
before. Of Triton's private interface this uses, as it is from Triton 3.4 to 3.8: the attributes of a driver that
``JITFunction.run`` and ``CompiledKernel._init_handles`` read, the signature of a launcher, and
``knobs.compilation.listener``, which is told where a compiled kernel was stored.

``JITFunction`` keeps compiled kernels per device, so every emulated architecture is a device of its own: nothing that
was compiled for one reaches another, nor a real GPU.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from emulated_cuda.launch import MOST_SHARED, Compiled

Run = Callable[..., None]
"""``run(compiled, grid, block, shared, values)``, where ``values(sizes)`` are the packed arguments."""

_compiled: dict[str, Compiled] = {}  # by Triton's hash of source, options and target


class Driver:
    """The part of a Triton driver that compiling and launching need."""

    def __init__(self, arch: int, multiprocessors: int, run: Run) -> None:
        self.arch, self.multiprocessors, self.run = arch, multiprocessors, run
        self.utils = self
        self.launcher_cls = Launcher

    def get_current_device(self) -> str:
        return f"emulated sm_{self.arch}"

    def set_current_device(self, device: str) -> None:
        pass

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_device_capability(self, device: str = "") -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed on an emulated GPU: give the kernel a fixed configuration")

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {
            "max_shared_mem": MOST_SHARED[self.arch],
            "max_num_regs": 65536,
            "warpSize": 32,
            "multiprocessor_count": self.multiprocessors,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: str) -> tuple[Any, ...]:
        registers, spills, most_threads = 0, 0, 1024
        return None, name, registers, spills, most_threads  # no module, so there is none to unload


class Launcher:
    """What Triton calls to launch one compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.types = list(source.signature.values())
        self.compiled = _compiled[metadata.hash]
        self.metadata = metadata
        options = self.compiled.metadata
        for name, plain in (("num_ctas", 1), ("launch_cooperative_grid", False), ("launch_pdl", False)):
            if options.get(name, plain) != plain:
                raise NotImplementedError(f"{metadata.name}: {name}={options[name]} is not emulated")

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: str,
        packed: Any,
        launch_metadata: Any,
        enter: Callable[[Any], None] | None,
        leave: Callable[[Any], None] | None,
        *arguments: Any,
    ) -> None:
        if enter is not None:
            enter(launch_metadata)
        if x * y * z > 0:  # as the real launcher, which skips an empty grid
            metadata = self.metadata
            packed = [value for pair in zip(arguments, self.types, strict=True) for value in _packed(*pair)]
            scratch = [self.scratch(name, x * y * z) for name in ("global_scratch_size", "profile_scratch_size")]
            packed += [_address(tensor) for tensor in scratch]
            block = (32 * metadata.num_warps, 1, 1)
            run = triton.runtime.driver.active.run
            run(self.compiled, (x, y, z), block, metadata.shared, lambda sizes: packed[: len(sizes)])
        if leave is not None:
            leave(launch_metadata)

    def scratch(self, name: str, programs: int) -> torch.Tensor | None:
        size = self.compiled.metadata.get(name) or 0
        return torch.empty(size * programs, dtype=torch.uint8) if size else None


@contextmanager
def installed(arch: int, multiprocessors: int, run: Run) -> Iterator[None]:
    """Make an emulated GPU the one that Triton sees."""
    config, compilation = triton.runtime.driver, triton.knobs.compilation
    before, listener = dict(vars(config)), compilation.listener
    config.set_active(Driver(arch, multiprocessors, run))
    compilation.listener = _remember
    try:
        yield
    finally:
        compilation.listener = listener
        vars(config).clear()
        vars(config).update(before)


def _remember(*, metadata: dict[str, Any], metadata_group: dict[str, str], **_: Any) -> None:
    files = {Path(name).suffix: Path(path) for name, path in metadata_group.items()}
    ptx, cubin = files[".ptx"].read_text(encoding="utf-8"), files[".cubin"].read_bytes()
    _compiled[metadata["hash"]] = Compiled(metadata["name"], metadata["target"].arch, ptx, cubin, dict(metadata))


def _packed(value: Any, kind: Any) -> Iterator[bytes]:
    """``value`` as the kernel's parameters hold it; ``kind`` is its type in Triton's signature."""
    if isinstance(kind, tuple):
        for pair in zip(value, kind, strict=True):
            yield from _packed(*pair)
    elif kind == "constexpr":
        return
    elif kind.startswith("*"):
        yield _address(value)
    elif kind in ("fp32", "f32", "fp64", "fp16"):
        yield struct.pack({"fp64": "<d", "fp16": "<e"}.get(kind, "<f"), value)
    elif kind == "bf16":
        yield struct.pack("<f", value)[2:]  # cut off, not rounded: the real launcher does so too
    elif kind[0] in "iu" and kind[1:].isdigit():
        size = max(1, int(kind[1:]) // 8)
        yield (int(value) % (1 << 8 * size)).to_bytes(size, "little")
    else:
        raise NotImplementedError(f"an argument of type {kind} is not emulated")


def _address(value: Any) -> bytes:
    address = 0 if value is None else value if isinstance(value, int) else value.data_ptr()
    return address.to_bytes(8, "little")
