"""Builds a shared library from C++ sources with ninja, at first use, and keeps it.

The folder is named after everything that the result depends on, so a changed source or compiler makes a new one:
``$XDG_CACHE_HOME/ptx_emulator/<name>-<hash>`` (``~/.cache`` by default). Where the sources lie does not matter: a
checkout and an installed package share what was built.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptx_emulator"
HEADERS = (".h", ".cuh")


class BuildError(RuntimeError):
    """The compiler or ninja failed, or one of them is missing; the message says what to do."""


def compiler() -> list[str]:
    """The C++ compiler.

    Raises:
        BuildError: there is none.
    """
    names = shlex.split(os.environ.get("CXX", ""))
    for name in [names[0]] if names else ["c++", "g++", "clang++"]:
        if shutil.which(name):
            return names or [name]
    raise BuildError("needs a C++ compiler (on Debian and Ubuntu: apt install g++)")


def build(
    name: str,
    commands: Iterable[tuple[Sequence[str], Path, str]],
    link: Sequence[str],
    *,
    depends: Iterable[Path] = (),
    suffix: str = ".so",
) -> Path:
    """The library ``name``, compiled if it is not in the cache.

    Args:
        commands: for each source, what compiles it (``-c source -o object`` is appended), the source, and the object's
            name.
        link: what links the objects (they and ``-o library`` are appended); libraries belong to ``depends`` or flags
            that follow a ``--`` element, which come after the objects.
        depends: further files that the result depends on: headers.

    Raises:
        BuildError: with the compiler's output.
    """
    commands = [([*command], Path(source), made) for command, source, made in commands]
    split = list(link).index("--") if "--" in link else len(link)
    first, last = list(link)[:split], list(link)[split + 1 :]
    recipe = [*((command, made) for command, _, made in commands), first, last]
    folder = CACHE / f"{name}-{_digest(recipe, [source for _, source, _ in commands], depends)}"
    library = folder / f"{name}{suffix}"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:  # who comes second waits, and finds it made
        fcntl.flock(lock, fcntl.LOCK_EX)
        return library if library.exists() else _make(name, library, commands, first, last)


def _make(name: str, library: Path, commands: Iterable[tuple], first: Sequence[str], last: Sequence[str]) -> Path:
    """Compile and link ``library``, which appears only when it is whole."""
    folder = library.parent
    unfinished = f"{library.name}.{os.getpid()}"
    rules = []
    for number, (command, source, made) in enumerate(commands):
        rules.append(f"rule compile{number}\n  command = {_quoted(command)} -c $in -o $out\n")
        rules.append(f"build {os.getpid()}/{made}: compile{number} {_path(source)}\n")
    objects = " ".join(f"{os.getpid()}/{made}" for _, _, made in commands)
    rules.append(f"rule link\n  command = {_quoted(first)} $in {_quoted(last)} -o $out\n")
    rules.append(f"build {unfinished}: link {objects}\n")
    script = folder / f"{os.getpid()}.ninja"
    script.write_text("\n".join(rules), encoding="utf-8")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command = [*_ninja(), "-C", str(folder), "-f", script.name, *jobs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"building {name} failed:\n{done.stdout}{done.stderr}")
    (folder / unfinished).replace(library)
    shutil.rmtree(folder / str(os.getpid()), ignore_errors=True)
    return library


def _ninja() -> list[str]:
    found = shutil.which("ninja", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if found is None:
        raise BuildError("needs ninja: pip install ninja")
    return [found]


def _digest(recipe: list, sources: Iterable[Path], depends: Iterable[Path]) -> str:
    digest = hashlib.sha256(repr(recipe).encode())
    for file in [*sources, *sorted(depends)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _quoted(command: Sequence[str]) -> str:
    return shlex.join(command).replace("$", "$$")


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def build_emulator() -> Path:
    """The emulator itself, as a Python extension module.

    Raises:
        BuildError: no compiler, no ninja or no pybind11.
    """
    try:
        import pybind11
    except ImportError as failure:
        raise BuildError("needs pybind11: pip install pybind11") from failure
    folder = Path(__file__).with_name("csrc")
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    # Contraction would round once where PTX rounds twice; signed overflow wraps on the GPU.
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fwrapv", "-Wall", "-Wextra"]
    command = [*compiler(), *flags, *include]
    sources = sorted(folder.rglob("*.cpp"))
    commands = [(command, source, f"{source.relative_to(folder)}.o".replace("/", "-")) for source in sources]
    headers = [file for file in folder.rglob("*") if file.suffix in HEADERS]
    return build("_ptx_emulator", commands, [*compiler(), "-shared"], depends=headers)
