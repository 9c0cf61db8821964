"""Builds the compiled parts: mlip_kernels/_cpu.so and, where nvcc is found, mlip_kernels/_cuda.so.

Both use only the LibTorch stable ABI and no Python C API, so one build serves every torch from 2.10 on and every
Python. The compilers are called directly rather than through torch.utils.cpp_extension: that one needs a torch built
for the CUDA of the toolkit at hand, and these parts do not.

A part that cannot be built is left out, and the reason is written to mlip_kernels/_build.json, from where the warning
at first use and `python -m mlip_kernels.env` repeat it. ENVIRONMENT.md describes the variables read here.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
ENV = os.environ
DEBUG = ENV.get("DEBUG") == "1"
STRICT = ENV.get("MLIP_KERNELS_STRICT") == "1"
OLDEST_TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10: the oldest torch in which the parts load
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")
MEMORY_PER_JOB = 2 << 30


class LeftOutError(Exception):
    """Why a part is not built."""


class FailedError(LeftOutError):
    """A part that should have been built and was not: an error under MLIP_KERNELS_STRICT=1."""


def run(command: list[str]) -> str:
    """Run one compiler command; what it complains about becomes the reason."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        output = (done.stderr + done.stdout).strip()
        print(f"{shlex.join(command)}\n{output}", file=sys.stderr)
        errors = [line for line in output.splitlines() if re.search("error|fatal", line, re.IGNORECASE)]
        raise FailedError(f"the build failed: {(errors or [output or 'no message'])[0].strip()[:300]}")
    return done.stdout


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
    includes = [f"-I{HERE / 'csrc'}", f"-I{torch_folder() / 'include'}"]
    return [*language, *optimise, *warnings, *includes, *shlex.split(ENV.get("CXXFLAGS", ""))]


def link(objects: list[Path], libraries: list[str]) -> list[str]:
    torch_libraries = [f"-L{torch_folder() / 'lib'}", "-ltorch_cpu", "-lc10"]
    return [
        *cxx(),
        "-shared",
        "-Wl,--as-needed",
        *([] if DEBUG else ["-s"]),
        *map(str, objects),
        *libraries,
        *torch_libraries,
    ]


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


def gencode(nvcc: str) -> list[str]:
    """Flags for the architectures of TORCH_CUDA_ARCH_LIST, or for those of the default list that nvcc knows."""
    wanted = re.split(r"[;,\s]+", ENV.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if wanted == [""]:
        known = run([nvcc, "--list-gpu-code"]).split()
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


class BuildParts(build_ext):
    """Compiles what can be compiled, links it, and writes down what became of each part."""

    def run(self) -> None:
        self.to = HERE / "mlip_kernels" if self.inplace else Path(self.build_lib) / "mlip_kernels"
        self.to.mkdir(parents=True, exist_ok=True)
        record = {"cpu": self.attempt("cpu", self.build_cpu), "cuda": self.attempt("cuda", self.build_cuda)}
        record["torch"] = metadata.version("torch") if importlib.util.find_spec("torch") else "none"
        (self.to / "_build.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def attempt(self, part: str, build) -> str:
        library = self.to / f"_{part}.so"
        library.unlink(missing_ok=True)
        try:
            if ENV.get("MLIP_KERNELS_SKIP_EXT") == "1":
                raise LeftOutError("skipped by MLIP_KERNELS_SKIP_EXT=1 when the package was built")
            unfinished = library.with_suffix(".so.unfinished")
            run([*build(), "-o", str(unfinished)])
            unfinished.replace(library)
            return "ok"
        except LeftOutError as reason:
            demanded = STRICT or (part == "cuda" and ENV.get("FORCE_CUDA") == "1")
            if demanded and isinstance(reason, FailedError):
                raise SystemExit(f"mlip_kernels: the {part} part was demanded, but {reason}") from reason
            print(f"mlip_kernels: left out the {part} part: {reason}", file=sys.stderr)
            return str(reason)

    def build_cpu(self) -> list[str]:
        compile_cxx = [*cxx(), *cxx_flags()]
        sources = [*sorted(HERE.glob("csrc/bindings/cpu/*.cpp")), *sorted(HERE.glob("csrc/cpu/**/*.cpp"))]
        return link(self.compile([(compile_cxx, source) for source in sources]), [])

    def build_cuda(self) -> list[str]:
        if ENV.get("FORCE_CUDA") == "0":
            raise LeftOutError("skipped by FORCE_CUDA=0 when the package was built")
        home = cuda_home()
        compile_cxx = [*cxx(), *cxx_flags(), f"-I{home / 'include'}"]
        compile_cuda = [str(home / "bin" / "nvcc"), "-std=c++17", "--expt-relaxed-constexpr", f"-I{HERE / 'csrc'}"]
        compile_cuda += ["-O0", "-g"] if DEBUG else ["-O3", "-DNDEBUG"]
        compile_cuda += ["--threads", ENV.get("NVCC_THREADS", "2"), "-Xcompiler=-fPIC,-fvisibility=hidden"]
        compile_cuda += ["-ccbin", cxx()[0], *gencode(compile_cuda[0])]
        objects = self.compile(
            [(compile_cuda, source) for source in sorted(HERE.glob("csrc/cuda/**/*.cu"))]
            + [(compile_cxx, source) for source in sorted(HERE.glob("csrc/bindings/cuda/*.cpp"))]
        )
        folders = [f"-L{home / lib}" for lib in ("lib64", "lib", "targets/x86_64-linux/lib") if (home / lib).exists()]
        return link(objects, [*folders, "-lcudart_static", "-lrt", "-lpthread", "-ldl"])

    def compile(self, work: list[tuple[list[str], Path]]) -> list[Path]:
        """Compile sources in parallel; what is newer than all it was made from is left alone."""
        jobs = [(command, source, self.object_of(source)) for command, source in work]
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        most = int(ENV.get("MAX_JOBS") or max(1, min(os.cpu_count() or 1, memory // MEMORY_PER_JOB)))
        with ThreadPoolExecutor(most) as pool:
            list(pool.map(lambda job: self.compile_one(*job), jobs))
        return [target for _, _, target in jobs]

    def object_of(self, source: Path) -> Path:
        return Path(self.build_temp).resolve() / source.relative_to(HERE).with_suffix(source.suffix + ".o")

    def compile_one(self, command: list[str], source: Path, target: Path) -> None:
        dependencies, recipe = target.with_suffix(".d"), target.with_suffix(".command")
        command = [*command, "-MD", "-MF", str(dependencies), "-c", str(source), "-o", str(target)]
        if target.exists() and recipe.exists() and recipe.read_text() == shlex.join(command):
            made_from = map(Path, dependencies.read_text().replace("\\\n", " ").partition(":")[2].split())
            if all(file.exists() and file.stat().st_mtime < target.stat().st_mtime for file in made_from):
                return
        target.parent.mkdir(parents=True, exist_ok=True)
        recipe.unlink(missing_ok=True)
        run(command)
        recipe.write_text(shlex.join(command))

    def get_outputs(self) -> list[str]:
        return [str(file) for file in (*self.to.glob("_*.so"), self.to / "_build.json")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """py3-none-<platform>: machine code, but none that knows Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


parts = [Extension(f"mlip_kernels._{part}", sources=[]) for part in ("cpu", "cuda")]  # makes it a platform wheel
setup(ext_modules=parts, cmdclass={"build_ext": BuildParts, "bdist_wheel": Wheel})
