"""Installs the package in every way that people do: ``pytest -m slow tests/packaging`` (about ten minutes, one core).

Each case gets a virtual environment of its own that sees the packages of the one running the tests, so that torch is
installed once. The last case needs torch of another version, and downloads it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
OWN_VARIABLES = ("MLIP_KERNELS_", "CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CXX", "PYTHONPATH")
OTHER_TORCH = "2.13.0"
NVCC = shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()
HAVE_CUDA = "ok" if NVCC else "no nvcc"

CHECK = """
import warnings, torch
from mlip_kernels._loading import outcomes
import mlip_kernels
x, weight = torch.randn(3, 50, 17), torch.rand(3, 50)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        mean = mlip_kernels.weighted_mean(x, weight)
torch.testing.assert_close(mean, (x * weight[..., None]).sum(1) / weight.sum(1, keepdim=True))
print("torch", torch.__version__)
print("file", mlip_kernels.__file__)
print("warnings", len([w for w in seen if "mlip_kernels" in str(w.message)]))
for part, outcome in outcomes().items():
    print(part, outcome)
"""


class Environment:
    """A virtual environment, its pip and a clean copy of the source tree."""

    def __init__(self, folder: Path, *, inherit: bool = True) -> None:
        self.folder = folder
        self.source = folder / "source"
        files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        for name in files:
            (self.source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.source / name)
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        self.python = folder / "venv" / "bin" / "python"
        if inherit:
            # an old Python puts an old setuptools into a new environment, in front of the inherited one
            self.run("-m", "pip", "uninstall", "--quiet", "--yes", "setuptools")
            (self.site() / "inherited.pth").write_text(sysconfig.get_path("purelib"))

    def site(self) -> Path:
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        return Path(
            subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        )

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OWN_VARIABLES)}
        command = [str(self.python), *command]
        return subprocess.run(
            command, cwd=self.folder, env=environment | variables, capture_output=True, text=True, check=False
        )

    def install(self, *options: str, what: str | None = None, **variables: str) -> subprocess.CompletedProcess:
        # --ignore-installed: the inherited environment may hold the package itself, which is not this one's to remove
        return self.run(
            "-m", "pip", "install", "--ignore-installed", "--no-deps", *options, what or str(self.source), **variables
        )

    def state(self) -> dict[str, str]:
        done = self.run("-c", CHECK)
        assert done.returncode == 0, done.stderr
        return dict(line.split(" ", 1) for line in done.stdout.splitlines())


@pytest.fixture
def environment(tmp_path):
    yield Environment(tmp_path)
    shutil.rmtree(tmp_path)


INSTALLS = {
    # name: (pip's options, variables, what the CPU part says, what the CUDA part says)
    "isolated": ((), {}, "ok", HAVE_CUDA),
    "no isolation": (("--no-build-isolation",), {}, "ok", HAVE_CUDA),
    "editable": (("--editable",), {}, "ok", HAVE_CUDA),
    "FORCE_CUDA=0": ((), {"FORCE_CUDA": "0"}, "ok", "FORCE_CUDA=0"),
    "no nvcc": ((), {"CUDA_HOME": "/nonexistent"}, "ok", "no nvcc was found in CUDA_HOME=/nonexistent"),
    "unknown architecture": ((), {"TORCH_CUDA_ARCH_LIST": "3.0"}, "ok", "the build failed" if NVCC else "no nvcc"),
    "no compiler": ((), {"CXX": "/nonexistent"}, "no C++ compiler", "no C++ compiler" if NVCC else "no nvcc"),
    "SKIP_EXT": ((), {"MLIP_KERNELS_SKIP_EXT": "1"}, "MLIP_KERNELS_SKIP_EXT=1", "MLIP_KERNELS_SKIP_EXT=1"),
    "STRICT": ((), {"MLIP_KERNELS_STRICT": "1"}, "ok", HAVE_CUDA),
}


@pytest.mark.parametrize("name", INSTALLS)
def test_it_installs(name, environment, record_property):
    options, variables, cpu, cuda = INSTALLS[name]
    start = time.perf_counter()
    done = environment.install(*options, **variables)
    record_property("seconds", time.perf_counter() - start)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Collecting torch" not in done.stdout
    state = environment.state()
    print(
        f"{name:24s} exit 0  {time.perf_counter() - start:5.1f} s  CPU: {state['cpu'][:40]}  CUDA: {state['cuda'][:60]}"
    )
    assert cpu in state["cpu"]
    assert cuda in state["cuda"]
    assert state["torch"] == torch.__version__
    assert state["warnings"] == ("0" if cpu == "ok" else "1")
    assert (str(environment.source) in state["file"]) == ("--editable" in options)
    shown = environment.run("-m", "mlip_kernels.env")
    assert shown.returncode == 0
    assert state["cpu"] in shown.stdout


REFUSED = {
    "no nvcc, FORCE_CUDA=1": ({"CUDA_HOME": "/nonexistent", "FORCE_CUDA": "1"}, "FORCE_CUDA=1, but no nvcc was found"),
    "no compiler, STRICT": ({"CXX": "/nonexistent", "MLIP_KERNELS_STRICT": "1"}, "no C++ compiler: CXX=/nonexistent"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_fails_where_the_impossible_was_demanded(name, environment):
    variables, message = REFUSED[name]
    start = time.perf_counter()
    done = environment.install(**variables)
    print(f"{name:24s} exit {done.returncode}  {time.perf_counter() - start:5.1f} s")
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_an_sdist_becomes_a_wheel_that_runs_on_another_torch(tmp_path):
    pytest.importorskip("build", reason="needs the build frontend: pip install build")
    here = Environment(tmp_path / "here")
    built = here.run("-m", "build", "--outdir", str(tmp_path / "dist"), str(here.source))
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.startswith("mlip_kernels-")
    assert "-py3-none-linux_" in wheel.name
    there = Environment(tmp_path / "there", inherit=False)
    downloaded = there.run("-m", "pip", "install", f"torch=={OTHER_TORCH}", "numpy")
    assert downloaded.returncode == 0, downloaded.stderr
    done = there.install(what=str(wheel))
    assert done.returncode == 0, done.stdout + done.stderr
    state = there.state()
    print(f"sdist -> wheel -> torch {state['torch']}: CPU {state['cpu']}, CUDA {state['cuda']}")
    assert state["torch"].startswith(OTHER_TORCH)
    assert state["cpu"] == "ok"
    assert HAVE_CUDA in state["cuda"]
    shutil.rmtree(tmp_path)
