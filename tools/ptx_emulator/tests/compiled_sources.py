"""Compiles the sources beside the tests, and keeps the results in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from ptx_emulator.build import CACHE, compiler

HERE = Path(__file__).resolve().parent


@cache
def cuda_home() -> Path:
    """The CUDA toolkit; without one the test that asks is skipped. nvcc is asked where it lives: it may be a script."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [named] if named else ["/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc and not named:
        dry_run = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
        homes[:0] = re.findall(r"#\$ TOP=(.+?)\s*$", dry_run.stderr, re.MULTILINE)
    for home in map(Path, homes):
        if (home / "bin" / "nvcc").exists():
            return home.resolve()
    pytest.skip("needs nvcc: install the CUDA toolkit, or set CUDA_HOME to it")


def _made(name: str, command: list[str], sources: list[Path]) -> Path:
    """What ``command`` writes, from the cache if its sources have not changed."""
    digest = hashlib.sha256(repr(command).encode())
    for source in sources:
        digest.update(source.read_bytes())
    target = CACHE / "tests" / f"{digest.hexdigest()[:16]}-{name}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{target.name}.{os.getpid()}")
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        unfinished.replace(target)
    return target


@cache
def ptx(source: str, arch: int) -> str:
    """A CUDA source as PTX."""
    path = HERE / source
    nvcc = [str(cuda_home() / "bin" / "nvcc"), "-std=c++17", "-O3", "-ccbin", compiler()[0]]
    command = [*nvcc, "-lineinfo", "-ptx", f"-arch=sm_{arch}", str(path)]
    return _made(f"{path.stem}.ptx", command, [path, *path.parent.glob("*.h")]).read_text()


@cache
def library(source: str) -> ctypes.CDLL:
    """A C++ source as a shared library. Floats are not contracted: every operation rounds."""
    path = HERE / source
    include = cuda_home() / "include"
    command = [*compiler(), "-std=c++17", "-O2", "-ffp-contract=off", "-fwrapv", "-shared", "-fPIC", f"-I{include}"]
    return ctypes.CDLL(str(_made(f"{path.stem}.so", [*command, str(path)], [path, *path.parent.glob("*.h")])))
