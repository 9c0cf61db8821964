"""Compiles the sources beside the tests with the build's own flags, and keeps the results in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from ptx_emulator.build import CACHE, compiler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "_build"))
import compilers  # noqa: E402


@cache
def cuda_home() -> Path:
    """The CUDA toolkit; without one the test that asks is skipped."""
    try:
        return compilers.cuda_home()
    except compilers.LeftOutError as missing:
        pytest.skip(f"needs nvcc: {missing}")


def _made(name: str, command: list[str], sources: list[Path]) -> Path:
    """What ``command`` writes, from the cache if its sources have not changed."""
    digest = hashlib.sha256(repr(command).encode())
    for source in sources:
        digest.update(source.read_bytes())
    target = CACHE / "emulator_tests" / f"{digest.hexdigest()[:16]}-{name}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{target.name}.{os.getpid()}")
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        unfinished.replace(target)
    return target


@cache
def ptx(source: str, arch: int, *flags: str) -> str:
    """A CUDA source as PTX, from the flags that every kernel of the package is built with."""
    path = HERE / source
    command = [*compilers.nvcc(cuda_home()), *flags, "-lineinfo", "-ptx", f"-arch=sm_{arch}", str(path)]
    return _made(f"{path.stem}.ptx", command, [path, *path.parent.glob("*.h")]).read_text()


@cache
def library(source: str) -> ctypes.CDLL:
    """A C++ source as a shared library. Floats are not contracted: every operation rounds."""
    path = HERE / source
    include = cuda_home() / "include"
    command = [*compiler(), "-std=c++17", "-O2", "-ffp-contract=off", "-fwrapv", "-shared", "-fPIC", f"-I{include}"]
    return ctypes.CDLL(str(_made(f"{path.stem}.so", [*command, str(path)], [path, *path.parent.glob("*.h")])))
