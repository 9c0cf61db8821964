"""The compilers and their flags: what `setup.py` builds with, and the tests of the CUDA kernels too."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ
DEBUG = ENV.get("DEBUG") == "1"
OLDEST_TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10: the oldest torch in which the parts load
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")


class LeftOutError(Exception):
    """Why a part is not built."""


class FailedError(LeftOutError):
    """A part that should have been built and was not: an error under MLIP_KERNELS_STRICT=1."""


def package_module(name: str) -> ModuleType:
    """A module of the package that needs nothing else, loaded from its file: the package itself would import torch."""
    spec = importlib.util.spec_from_file_location(f"mlip_kernels_build{name}", ROOT / "mlip_kernels" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"mlip_kernels/{name}.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(command: list[str]) -> str:
    """Run one compiler command; what it complains about becomes the reason."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        output = (done.stderr + done.stdout).strip()
        print(f"{shlex.join(command)}\n{output}", file=sys.stderr)
        errors = [line for line in output.splitlines() if re.search("error|fatal", line, re.IGNORECASE)]
        raise FailedError(f"the build failed: {(errors or [output or 'no message'])[0].strip()[:300]}")
    return done.stdout


def compile_one(command: list[str], source: Path, target: Path) -> None:
    """Compile a source, unless its object is newer than all that it was made from, by the same command."""
    dependencies, recipe = target.with_suffix(".d"), target.with_suffix(".command")
    command = [*command, "-MD", "-MF", str(dependencies), "-c", str(source), "-o", str(target)]
    if target.exists() and recipe.exists() and recipe.read_text() == shlex.join(command):
        made_from = prerequisites(dependencies.read_text())
        if all(file.exists() and file.stat().st_mtime < target.stat().st_mtime for file in made_from):
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    recipe.unlink(missing_ok=True)
    run(command)
    recipe.write_text(shlex.join(command))


def prerequisites(rule: str) -> list[Path]:
    """The files after the colon of a rule for make, as compilers write it: spaces in names stand behind backslashes."""
    names = re.split(r"(?<!\\)\s+", rule.replace("\\\n", " ").partition(": ")[2].strip())
    return [Path(re.sub(r"\\([ #])", r"\1", name).replace("$$", "$")) for name in names if name]


def cxx() -> list[str]:
    """The C++ compiler."""
    names = shlex.split(ENV.get("CXX", ""))
    if names:
        if shutil.which(names[0]) is None:
            raise FailedError(f"no C++ compiler: CXX={ENV['CXX']} was not found")
        return names
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if found is None:
        raise FailedError("no C++ compiler (c++, g++ or clang++) was found when the package was built")
    return [found]


def torch_folder() -> Path:
    """The installed torch; it is looked at, not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise FailedError("no torch to build against")
    return Path(spec.submodule_search_locations[0])


def cxx_flags() -> list[str]:
    optimise = ["-O0", "-g"] if DEBUG else ["-O3", "-DNDEBUG"]
    warnings = ["-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]  # GCC 12 warns about its own AVX-512 header
    language = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", OLDEST_TORCH]
    headers = torch_folder() / "include"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{headers}"]
    # Messages of torch's headers name their file: let it not be the folder that it has on the machine of the build.
    no_folders = [f"-ffile-prefix-map={folder}/=" for folder in (ROOT, headers)]
    return [*language, *optimise, *warnings, *includes, *no_folders, *shlex.split(ENV.get("CXXFLAGS", ""))]


def torch_libraries() -> list[str]:
    return [f"-L{torch_folder() / 'lib'}", "-ltorch_cpu", "-lc10"]


def cuda_home() -> Path:
    """The CUDA toolkit; nvcc itself is asked where it lives, as it may be a wrapper script."""
    named = ENV.get("CUDA_HOME") or ENV.get("CUDA_PATH")
    homes = [named] if named else ["/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc and not named:
        dry_run = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
        homes[:0] = re.findall(r"#\$ TOP=(.+?)\s*$", dry_run.stderr, re.MULTILINE)
    for home in map(Path, homes):
        if (home / "bin" / "nvcc").exists():
            return home.resolve()
    where = f"in CUDA_HOME={named}" if named else "when the package was built"
    if ENV.get("FORCE_CUDA") == "1":
        raise SystemExit(f"mlip_kernels: FORCE_CUDA=1, but no nvcc was found {where}; set CUDA_HOME to a CUDA toolkit")
    raise LeftOutError(f"no nvcc was found {where}")


def nvcc(home: Path) -> list[str]:
    """nvcc and the flags of every kernel, without an architecture: `gencode` names those."""
    optimise = ["-O0", "-g"] if DEBUG else ["-O3", "-DNDEBUG"]
    language = ["-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", "-ccbin", cxx()[0]]
    return [str(home / "bin" / "nvcc"), *language, *optimise, f"-I{ROOT / 'csrc'}"]


def gencode(home: Path) -> list[str]:
    """Flags for the architectures of TORCH_CUDA_ARCH_LIST, or for those of the default list that nvcc knows."""
    wanted = re.split(r"[;,\s]+", ENV.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if wanted == [""]:
        known = run([str(home / "bin" / "nvcc"), "--list-gpu-code"]).split()
        wanted = [a for a in ARCHITECTURES if f"sm_{a.removesuffix('+PTX').replace('.', '')}" in known]
    flags = []
    for architecture in wanted:
        if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", architecture):
            raise FailedError(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0;9.0+PTX, got {architecture!r}")
        number = architecture.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags
