"""Compiles what is not compiled yet, or no longer up to date: ninja, in the user's cache folder.

`ptx_emulator.build` compiles everything anew when anything has changed. Here only what depends on the change is: who
works on one kernel does not wait for the others.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptx_emulator.build import BuildError

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlip_kernels"


@dataclass(frozen=True)
class Step:
    """One command that makes ``target`` from ``sources``; ``{target}`` and ``{dependencies}`` in it are filled in."""

    target: Path
    sources: tuple[Path, ...]
    command: tuple[str, ...]


def folder(name: str, *depends_on: str) -> Path:
    """A folder of the cache for files that are valid as long as ``depends_on`` is the same."""
    key = hashlib.sha256("\0".join(depends_on).encode()).hexdigest()[:16]
    return CACHE / f"{name}-{key}"


def make(place: Path, steps: Iterable[Step]) -> None:
    """Bring every target up to date: sources, included files and commands decide. One process at a time.

    Raises:
        BuildError: a command failed; the message is what it said.
    """
    place.mkdir(parents=True, exist_ok=True)
    text = "ninja_required_version = 1.8\n\n" + "\n".join(_rule(step) for step in steps)
    with open(place / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = place / "build.ninja"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        command = [sys.executable, "-m", "ninja", "-C", str(place), "-j", jobs]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def _rule(step: Step) -> str:
    name, dependencies = step.target.name.replace(".", "_"), step.target.with_suffix(step.target.suffix + ".d")
    command = [word.format(target=step.target, dependencies=dependencies) for word in step.command]
    lines = [f"rule {name}", f"  command = {_quoted(command)}"]
    if "{dependencies}" in step.command:
        lines += [f"  depfile = {_escaped(dependencies)}", "  deps = gcc"]
    sources = " ".join(_escaped(source) for source in step.sources)
    return "\n".join([*lines, f"build {_escaped(step.target)}: {name} {sources}", ""])


def _quoted(command: Sequence[str]) -> str:
    return " ".join("'" + word.replace("'", "'\\''") + "'" for word in command).replace("$", "$$")


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
