"""Fixtures that more than one family of tests uses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mlip_kernels
from mlip_kernels import _loading, env, testing

PACKAGE = Path(mlip_kernels.__file__).parent


def pytest_report_header() -> str:
    return env.summary()


def pytest_configure() -> None:
    """Stop where a source folder hides the installed package, or where an instruction set is not the one asked for."""
    if said := _loading.hiding():
        raise pytest.UsageError(said)
    testing.require_cpu_capability()
    wanted, found = os.environ.get("ATEN_CPU_CAPABILITY"), torch.backends.cpu.get_cpu_capability().lower()
    if wanted and wanted != found:
        raise pytest.UsageError(f"ATEN_CPU_CAPABILITY={wanted} was asked for, but PyTorch runs {found}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Names of tests are the same in every process, as those that share them out (pytest-xdist) require."""
    if unstable := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"a test is named by an address; give its parameters ids: {unstable[0]}")


class Copy:
    """A copy of the package's Python files, to be broken at will, and a way to run code against it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "mlip_kernels"
        shutil.copytree(PACKAGE, self.package, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        """``python <arguments>`` importing this copy, without the variables that would change what it does."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLIP_KERNELS_")}
        environment |= {"PYTHONPATH": str(self.folder), **variables}
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, check=False)


@pytest.fixture
def uncompiled(tmp_path: Path) -> Copy:
    """The package as it is where nothing could be compiled."""
    return Copy(tmp_path)
