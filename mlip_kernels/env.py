"""``python -m mlip_kernels.env``: what is installed, what was compiled, which variables are set; for bug reports.

It must work where everything else is broken: only the standard library is imported at module level, and each probe is
guarded on its own.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
VARIABLES = (
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "CXXFLAGS",
    "DEBUG",
    "FORCE_CUDA",
    "LD_LIBRARY_PATH",
    "MAX_JOBS",
    "NVCC_APPEND_FLAGS",
    "NVCC_THREADS",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "TORCH_CUDA_ARCH_LIST",
    "TRITON_INTERPRET",
)
"""Shown if set, beside every variable that starts with ``MLIP_KERNELS_``."""


def package() -> str:
    return f"{importlib.import_module('mlip_kernels').__version__} in {HERE}"


def python() -> str:
    return f"{platform.python_version()} ({sys.executable})"


def system() -> str:
    return f"{platform.platform()}, {os.cpu_count()} CPUs"


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def torch_version() -> str:
    torch = importlib.import_module("torch")
    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def torch_cuda() -> str:
    version = importlib.import_module("torch").version.cuda
    return f"built for CUDA {version}" if version else "built without CUDA"


def gpu() -> str:
    cuda = importlib.import_module("torch").cuda
    if not cuda.is_available():
        return "none visible to torch"
    names = (
        f"{cuda.get_device_name(i)} (sm_{''.join(map(str, cuda.get_device_capability(i)))})"
        for i in range(cuda.device_count())
    )
    return ", ".join(names)


def driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none found (no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return (shown.stdout or shown.stderr).strip().splitlines()[0]


def compiled_part(part: str) -> str:
    return importlib.import_module("mlip_kernels._library").LOADED[part]


def triton_part() -> str:
    if variables().flag("MLIP_KERNELS_DISABLE_EXT"):
        return "disabled by MLIP_KERNELS_DISABLE_EXT=1"
    try:
        return f"ok ({importlib.import_module('triton').__version__})"
    except ImportError as failure:
        return f"cannot be imported: {failure}"


def cpu_capability() -> str:
    if compiled_part("cpu") != "ok":
        return "none: the CPU part is absent"
    asked, used = importlib.import_module("mlip_kernels._loading").cpu_capability()
    return used if asked in (None, used) else f"{used} (MLIP_KERNELS_CPU_CAPABILITY={asked} was asked for)"


def cuda_backend() -> str:
    asked = variables().read("MLIP_KERNELS_CUDA_BACKEND") or "auto"
    return f"auto, {chosen()}" if asked == "auto" else asked


def chosen() -> str:
    """What ``auto`` takes on the first GPU, or where there is none, on the architectures of the table."""
    choices = importlib.import_module("mlip_kernels._cuda_choices")
    try:
        major, minor = importlib.import_module("torch").cuda.get_device_capability()
    except Exception:  # no GPU, or no torch that works: other probes say so
        return choices.summary()
    return choices.summary(10 * major + minor)


def build() -> str:
    record = importlib.import_module("mlip_kernels._build_record").read(HERE)
    facts = ", ".join(f"{part}: {outcome}" for part, outcome in record.items() if isinstance(outcome, str))
    return facts or "no record (_build.json) beside the package"


def hidden() -> str:
    importlib.import_module("mlip_kernels._library")
    other = importlib.import_module("mlip_kernels._loading").hidden_package()
    return "none" if other is None else f"{other} has parts that this one lacks, and stands behind it on the path"


def variables() -> ModuleType:
    return importlib.import_module("mlip_kernels._variables")


PROBES: tuple[tuple[str, Callable[[], str]], ...] = (
    ("mlip_kernels", package),
    ("python", python),
    ("system", system),
    ("processor", processor),
    ("torch", torch_version),
    ("torch CUDA", torch_cuda),
    ("GPU", gpu),
    ("driver", driver),
    ("CPU part", lambda: compiled_part("cpu")),
    ("CPU capability", cpu_capability),
    ("CUDA part", lambda: compiled_part("cuda")),
    ("Triton part", triton_part),
    ("CUDA backend", cuda_backend),
    ("build", build),
    ("hidden package", hidden),
)


def outcome(probe: Callable[[], str]) -> str:
    """What a probe found, or why it could not look."""
    try:
        return probe()
    except (Exception, SystemExit) as failure:
        reason = (str(failure).strip().splitlines() or ["no message"])[0]
        return f"not known ({type(failure).__name__}: {reason})"


def report() -> str:
    """Everything, one fact a line, as a block to paste into a bug report."""
    lines = [f"{label:<16}{outcome(probe)}" for label, probe in PROBES]
    names = sorted(name for name in os.environ if name in VARIABLES or name.upper().startswith("MLIP_KERNELS_"))
    lines += ["variables set:" if names else "variables set: none"]
    lines += [f"  {name}={os.environ[name]}{objection(name)}" for name in names]
    return "\n".join(["```", *lines, "```"])


def objection(name: str) -> str:
    """What is wrong with a variable that is set."""
    try:
        known = variables().AT_RUN_TIME | variables().AT_BUILD_TIME
        said = variables().unknown().get(name, "")
        if name in known:
            variables().read(name)
    except ValueError as failure:
        said = str(failure)
    return f"  <- {said}" if said else ""


def summary() -> str:
    """Which package this is, in one line: path, version, parts."""
    probes = dict(PROBES)
    parts = ", ".join(f"{label}: {outcome(probes[label])}" for label in ("CPU part", "CPU capability", "CUDA part"))
    return f"mlip_kernels {outcome(package)}, {parts}"


def main() -> None:
    """Print the report."""
    print(report())


if __name__ == "__main__":
    main()
