"""CUDA C++ operators without a GPU: their launchers as compiled code, their kernels as PTX.

The launchers (the host part of ``csrc/cuda``, and ``csrc/bindings/cuda``) are compiled as `setup.py` does, then linked
with ``cudart.cpp`` in the place of the CUDA runtime, and with ``include/`` in front of ``csrc/`` for what the bindings
know of a device. That registers the operators of ``mlip_kernels_cuda`` for CPU tensors, beside the real part, which
has the CUDA key. The kernels are compiled with the same flags to PTX, with line numbers.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from emulated_cuda.build import Step, folder, make
from mlip_kernels import _library

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT / "_build"))
import compilers  # noqa: E402

Pointers = ctypes.POINTER(ctypes.c_void_p)
Three = ctypes.POINTER(ctypes.c_uint * 3)
LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, Three, Three, ctypes.c_size_t, Pointers)
ALLOW = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
DESCRIBE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int))
INVALID_VALUE, NO_DEVICE = 1, 100  # cudaError_t

allowed_shared: dict[str, int] = {}
"""Most bytes of dynamic shared memory, by kernel, where a launcher asked for more than every kernel may have. For as
long as the process lives, as on a GPU."""


class Runtime(Protocol):
    """What stands behind ``cudart.cpp``. Launches and permissions return a cudaError_t."""

    @property
    def attributes(self) -> Mapping[int, int]:
        """What launchers may ask about the device: cudaDeviceAttr -> value."""

    def launch(
        self, library: CudaLibrary, kernel: str, grid: tuple, block: tuple, shared: int, parameters: Pointers
    ) -> int: ...

    def allow(self, kernel: str, dynamic_shared: int) -> int: ...


_runtime: Runtime | None = None
_callbacks: list[tuple] = []  # kept for good: C++ calls them, and does not count its references


def connect(runtime: Runtime | None) -> Runtime | None:
    """Let launches go to ``runtime`` from now on; returns where they went before."""
    global _runtime
    before, _runtime = _runtime, runtime
    return before


class CudaLibrary:
    """CUDA C++ files (``kernels``) and what calls their launchers (``bindings``), to be run without a GPU."""

    def __init__(self, name: str, kernels: Sequence[Path], bindings: Sequence[Path] = ()) -> None:
        self.name, self.kernels, self.bindings = name, tuple(kernels), tuple(bindings)

    @functools.cached_property
    def loaded(self) -> ctypes.CDLL:
        """The launchers, compiled if need be; operators among them are now registered with torch."""
        file = self._linked()
        torch.ops.load_library(file)
        library = ctypes.CDLL(str(file))
        library.emulated_cuda_connect.argtypes = [LAUNCH, ALLOW, DESCRIBE]
        callbacks = LAUNCH(self._launch), ALLOW(_allow), DESCRIBE(_describe)
        _callbacks.append(callbacks)
        library.emulated_cuda_connect(*callbacks)
        return library

    @functools.cache  # noqa: B019  (there are few libraries, and they live as long as the process)
    def ptx(self, arch: int) -> dict[Path, str]:
        """The kernels of every source file, compiled for ``compute_<arch>``."""
        targets = [f"{number}_{source.stem}.ptx" for number, source in enumerate(self.kernels)]
        return dict(
            zip(self.kernels, _compile_ptx(self.kernels, arch, self._folder(f"sm_{arch}"), targets), strict=True)
        )

    def cubins(self, arch: int) -> list[bytes]:
        """The machine code of every source file."""
        place, nvcc = self._folder(f"cubins_{arch}"), compilers.nvcc(compilers.cuda_home())
        command = (*nvcc, "-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}")
        options = ("-MD", "-MF", "{dependencies}", "-o", "{target}")
        steps = [
            Step(place / f"{count}_{source.stem}.cubin", (source,), (*command, *options, str(source)))
            for count, source in enumerate(self.kernels)
        ]
        make(place, steps)
        return [step.target.read_bytes() for step in steps]

    def _launch(self, kernel: bytes, grid: Three, block: Three, shared: int, parameters: Pointers) -> int:
        if _runtime is None:
            return NO_DEVICE
        name = plain_names(kernel.decode())
        return _runtime.launch(self, name, tuple(grid.contents), tuple(block.contents), shared, parameters)

    def _folder(self, part: str) -> Path:
        return folder("emulated_cuda", self.name, str(ROOT), torch.__version__, _nvcc_version()) / part

    def _linked(self) -> Path:
        place, home = self._folder("launchers"), compilers.cuda_home()
        cxx = [*compilers.cxx(), f"-I{HERE / 'include'}", *compilers.cxx_flags(), f"-I{home / 'include'}"]
        # one architecture and no machine code: these objects are wanted for their host part
        nvcc = [*compilers.nvcc(home), "-gencode=arch=compute_80,code=compute_80"]
        work = [(source, cxx) for source in (HERE / "cudart.cpp", *self.bindings)]
        work += [(source, nvcc) for source in self.kernels]
        compile_only = ["-MD", "-MF", "{dependencies}", "-o", "{target}", "-c"]
        steps = [
            Step(place / f"{number}_{source.name}.o", (source,), (*command, *compile_only, str(source)))
            for number, (source, command) in enumerate(work)
        ]
        objects, library = [step.target for step in steps], place / f"{self.name}.so"
        # every function of the runtime has to be in cudart.cpp, else it would be taken from the one that torch loaded
        link = [*compilers.cxx(), "-shared", "-Wl,--no-undefined", *map(str, objects), *compilers.torch_libraries()]
        make(place, [*steps, Step(library, tuple(objects), (*link, "-o", "{target}"))])
        return library


OPERATORS = CudaLibrary(
    "operators",
    sorted((ROOT / "csrc" / "cuda").glob("**/*.cu")),
    sorted((ROOT / "csrc" / "bindings" / "cuda").glob("*.cpp")),
)
"""The CUDA C++ operators of the package."""


@functools.cache
def missing() -> str | None:
    """What must be installed before this can be used, if anything."""
    try:
        compilers.cxx()
        compilers.cuda_home()
    except (compilers.LeftOutError, SystemExit) as reason:
        return f"needs the CUDA toolkit with nvcc, and a C++ compiler: {reason}"
    return None if importlib.util.find_spec("ninja") else "needs ninja: pip install ninja"


def operator(name: str) -> tuple[Callable | None, str]:
    """What computes operator ``name`` on CPU tensors, or ``None`` and why there is nothing."""
    assert OPERATORS.loaded
    overload = _library.cuda_operator(name)
    if overload is None or not torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CPU"):
        return None, "it has no CUDA C++ kernel"
    # called under its key, not by its name, so that a dispatch mode sees what it calls but not the operator itself
    return functools.partial(overload._op_dk, torch._C.DispatchKey.CPU), ""


@functools.cache
def compile_ptx(source: Path, arch: int) -> str:
    """A CUDA C++ file that lies elsewhere, compiled with the same flags; the result is put beside it."""
    return _compile_ptx((source,), arch, source.parent / f"sm_{arch}", [source.with_suffix(".ptx").name])[0]


def inlined(source: Path) -> str:
    """A CUDA C++ file with every header of ours in the place of its first inclusion, so that all can be changed."""
    seen: set[str] = set()

    def text(file: Path) -> str:
        return re.sub(r'^#include "(.+)"$', header, file.read_text(encoding="utf-8"), flags=re.MULTILINE)

    def header(found: re.Match[str]) -> str:
        name = found.group(1)
        if name in seen:
            return ""
        seen.add(name)
        return text(ROOT / "csrc" / name).replace("#pragma once\n", "")

    return text(source)


def plain_names(text: str) -> str:
    """Without the hashes of path and contents that nvcc writes into the names of what is in a nameless namespace."""
    return re.sub(r"(_GLOBAL__N__)[0-9a-f]{8}(_\d+_\w+?_cu_)[0-9a-f]{8}", r"\g<1>00000000\g<2>00000000", text)


def _allow(kernel: bytes, dynamic_shared: int) -> int:
    return NO_DEVICE if _runtime is None else _runtime.allow(plain_names(kernel.decode()), dynamic_shared)


def _describe(attribute: int, value: Any) -> int:
    if _runtime is None:
        return NO_DEVICE
    if attribute not in _runtime.attributes:
        return INVALID_VALUE
    value[0] = _runtime.attributes[attribute]
    return 0


def _compile_ptx(sources: Sequence[Path], arch: int, place: Path, targets: Sequence[str]) -> list[str]:
    nvcc = [*compilers.nvcc(compilers.cuda_home()), "-lineinfo", "-ptx", f"-arch=compute_{arch}"]
    steps = [
        Step(place / target, (source,), (*nvcc, "-MD", "-MF", "{dependencies}", str(source), "-o", "{target}"))
        for source, target in zip(sources, targets, strict=True)
    ]
    make(place, steps)
    return [plain_names(step.target.read_text(encoding="utf-8")) for step in steps]


@functools.cache
def _nvcc_version() -> str:
    nvcc = str(compilers.cuda_home() / "bin" / "nvcc")
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
