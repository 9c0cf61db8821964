"""Loading of the compiled parts, and why one that is absent is absent."""

from __future__ import annotations

import ctypes
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from mlip_kernels import _build_record, _variables

PACKAGE = Path(__file__).resolve().parent

DISABLED = _variables.flag("MLIP_KERNELS_DISABLE_EXT")
"""Whether the user asked for the reference everywhere: neither compiled parts nor Triton."""


class _Parts(dict[str, str]):
    """Loads a part when somebody first asks for it: a process without a GPU never pays for the CUDA part."""

    def __missing__(self, part: str) -> str:
        self[part] = _load_part(part)
        return self[part]


LOADED: dict[str, str] = _Parts()
"""Compiled part (``cpu``, ``cuda``) -> ``"ok"`` or the reason why it is absent."""

CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16")
"""Instruction sets of the CPU kernels, each with the ones before it."""

COMPILERS = {
    "cpu": "install a C++ compiler (on Debian and Ubuntu: apt install g++)",
    "cuda": "install the CUDA toolkit with nvcc (or name it in CUDA_HOME), or Triton",
}


class CPUCapability(NamedTuple):
    """Instruction sets of `CAPABILITIES`: ``used`` is lower than ``asked`` where the processor lacks that one."""

    asked: str | None  # by MLIP_KERNELS_CPU_CAPABILITY
    used: str | None  # None without the CPU part


def load() -> None:
    """Load the CPU part, or note why it is absent. The CUDA part is loaded when it is first asked for.

    Warns of variables that nobody reads, and of a CPU capability that was asked for and is not there.

    Raises:
        ValueError: a variable of the package holds what is not understood.
    """
    _variables.check(_variables.AT_RUN_TIME)
    for said in _variables.unknown().values():
        warnings.warn(f"mlip_kernels: {said}", stacklevel=2)
    LOADED["cpu"] = _load_part("cpu")
    if _variables.read("MLIP_KERNELS_CPU_CAPABILITY"):
        asked, used = cpu_capability()
        if used not in (None, asked):
            warnings.warn(
                f"mlip_kernels: MLIP_KERNELS_CPU_CAPABILITY={asked}, but this processor (or the compiler of the"
                f" package) has no more than {used}, which is used",
                stacklevel=2,
            )


def outcomes() -> dict[str, str]:
    """`LOADED` for every part, each loaded by now."""
    return {part: LOADED[part] for part in _build_record.PARTS}


def _load_part(part: str) -> str:
    library = PACKAGE / f"_{part}.so"
    if DISABLED:
        return "disabled by MLIP_KERNELS_DISABLE_EXT=1"
    if not library.exists():
        reason = _build_record.read(PACKAGE).get(part, "not built")
        return "the file is missing" if reason == "ok" else str(reason)
    if damage := _build_record.damage(PACKAGE, part):
        return f"damaged: {damage}"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as failure:
        return f"cannot be loaded: {failure}"
    return "ok"


def cpu_capability() -> CPUCapability:
    """The instruction set that the CPU kernels were asked to use, and the one they use."""
    asked = _variables.read("MLIP_KERNELS_CPU_CAPABILITY").replace("default", "baseline") or None
    if LOADED["cpu"] != "ok":
        return CPUCapability(asked, None)
    number = ctypes.CDLL(str(PACKAGE / "_cpu.so")).mlip_kernels_cpu_capability()
    return CPUCapability(asked, CAPABILITIES[number])


def hidden_package() -> Path | None:
    """A compiled package of the same name further along ``sys.path``, if nothing is compiled here: this one hides it.

    That is how ``python -m pytest`` in a clone meets the source folder, where nothing may be compiled, rather than what
    was installed.
    """
    for entry in () if DISABLED or "ok" in outcomes().values() else sys.path:
        other = (Path(entry) / PACKAGE.name).resolve()
        if other != PACKAGE and (other / "__init__.py").is_file():
            record = _build_record.read(other)
            if any(record.get(part) == "ok" and (other / f"_{part}.so").exists() for part in _build_record.PARTS):
                return other
    return None


def hiding() -> str:
    """What to say if this package hides one that has compiled parts; ``""`` if it does not."""
    other = hidden_package()
    if other is None:
        return ""
    return (
        f"mlip_kernels was imported from {PACKAGE}, where these parts are absent: "
        + ", ".join(f"{part.upper()} ({reason})" for part, reason in outcomes().items() if reason != "ok")
        + f". It hides the package installed in {other}, which has them. Work in another folder, or keep the current"
        " folder off the path (run `pytest`, not `python -m pytest`; `python -P` from Python 3.11 on), or compile here"
        " too: pip install --editable ."
    )


def absence(part: str) -> str:
    """The warning that the reference stands in for a part: why, and what to do about it."""
    damaged = LOADED[part].startswith("damaged: ")
    if said := hiding():
        remedy = said
    else:
        remedy = "To repair them, " if damaged else f"To build them, {COMPILERS[part]} and "
        remedy += "install again, in the source folder: pip install --force-reinstall --no-deps ."
    return (
        f"mlip_kernels: no compiled {part.upper()} kernels ({LOADED[part]}); the slower PyTorch reference runs instead."
        f" {remedy} Details: python -m mlip_kernels.env. MLIP_KERNELS_DISABLE_EXT=1 asks for the reference and silences"
        " this."
    )
