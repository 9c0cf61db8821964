"""Builds the compiled parts: mlip_kernels/_cpu.so and, where nvcc is found, mlip_kernels/_cuda.so.

Both use only the LibTorch stable ABI and no Python C API, so one build serves every torch from 2.10 on and every
Python. The compilers are called directly rather than through torch.utils.cpp_extension: that one needs a torch built
for the CUDA of the toolkit at hand, and these parts do not.

A part that cannot be built is left out, and the reason is written to mlip_kernels/_build.json, from where the warning
at first use and `python -m mlip_kernels.env` repeat it. docs/environment.md describes the variables read here.
"""

import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_build"))
import compilers  # noqa: E402
from compilers import FailedError, LeftOutError  # noqa: E402

ENV = os.environ
MEMORY_PER_JOB = 2 << 30

build_record = compilers.package_module("_build_record")
variables = compilers.package_module("_variables")
try:
    variables.check(variables.AT_BUILD_TIME)
except ValueError as _failure:
    raise SystemExit(f"mlip_kernels: {_failure}") from _failure
for _said in variables.unknown().values():
    print(f"mlip_kernels: {_said}", file=sys.stderr)
STRICT = variables.flag("MLIP_KERNELS_STRICT")
SKIP = variables.flag("MLIP_KERNELS_SKIP_EXT")


def unfinished(library: Path) -> Path:
    return library.with_suffix(".so.unfinished")


def link(objects: list[Path], libraries: list[str]) -> list[str]:
    strip = [] if compilers.DEBUG else ["-s"]
    command = [*compilers.cxx(), "-shared", "-Wl,--as-needed", *strip, *map(str, objects)]
    return [*command, *libraries, *compilers.torch_libraries()]


class BuildParts(build_ext):
    """Compiles what can be compiled, links it, and writes down what became of each part."""

    def run(self) -> None:
        self.to = HERE / "mlip_kernels" if self.inplace else Path(self.build_lib) / "mlip_kernels"
        self.to.mkdir(parents=True, exist_ok=True)
        record = {"cpu": self.attempt("cpu", self.build_cpu), "cuda": self.attempt("cuda", self.build_cuda)}
        for part, outcome in record.items():  # only now, so that libraries and record hardly ever disagree
            library = self.to / f"_{part}.so"
            if outcome == "ok":
                unfinished(library).replace(library)
            else:
                library.unlink(missing_ok=True)
        record["torch"] = metadata.version("torch") if importlib.util.find_spec("torch") else "none"
        build_record.write(self.to, record)

    def attempt(self, part: str, build_part) -> str:
        """Build a part beside the older library, which stays until both parts are done."""
        try:
            if SKIP:
                raise LeftOutError("skipped by MLIP_KERNELS_SKIP_EXT=1 when the package was built")
            compilers.run([*build_part(), "-o", str(unfinished(self.to / f"_{part}.so"))])
            return "ok"
        except LeftOutError as reason:
            demanded = STRICT or (part == "cuda" and variables.flag("FORCE_CUDA"))
            if demanded and isinstance(reason, FailedError):
                raise SystemExit(f"mlip_kernels: the {part} part was demanded, but {reason}") from reason
            print(f"mlip_kernels: left out the {part} part: {reason}", file=sys.stderr)
            return str(reason)

    def build_cpu(self) -> list[str]:
        compile_cxx = [*compilers.cxx(), *compilers.cxx_flags()]
        sources = [*sorted(HERE.glob("csrc/bindings/cpu/*.cpp")), *sorted(HERE.glob("csrc/cpu/**/*.cpp"))]
        return link(self.compile([(compile_cxx, source) for source in sources]), [])

    def build_cuda(self) -> list[str]:
        if ENV.get("FORCE_CUDA") == "0":
            raise LeftOutError("skipped by FORCE_CUDA=0 when the package was built")
        home = compilers.cuda_home()
        compile_cxx = [*compilers.cxx(), *compilers.cxx_flags(), f"-I{home / 'include'}"]
        threads = ["--threads", ENV.get("NVCC_THREADS", "2")]
        compile_cuda = [*compilers.nvcc(home), *threads, *compilers.gencode(home)]
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
            list(pool.map(lambda job: compilers.compile_one(*job), jobs))
        return [target for _, _, target in jobs]

    def object_of(self, source: Path) -> Path:
        return Path(self.build_temp).resolve() / source.relative_to(HERE).with_suffix(source.suffix + ".o")

    def get_outputs(self) -> list[str]:
        return [str(file) for file in (*self.to.glob("_*.so"), self.to / build_record.NAME)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """Runs `BuildParts` also where nothing is to be compiled: it writes down why, and removes older libraries."""

    sub_commands = [("build_py", None), ("build_ext", None)]  # noqa: RUF012


class Wheel(bdist_wheel):
    """py3-none-<platform>: machine code, but none that knows Python; py3-none-any without machine code."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


parts = [Extension(f"mlip_kernels._{part}", sources=[]) for part in build_record.PARTS]  # makes it a platform wheel
setup(ext_modules=[] if SKIP else parts, cmdclass={"build": Build, "build_ext": BuildParts, "bdist_wheel": Wheel})
