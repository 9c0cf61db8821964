"""Fixtures that more than one family of tests uses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import instruction_sets
import pytest
import torch

import mlip_kernels

PACKAGE = Path(mlip_kernels.__file__).parent


def pytest_configure() -> None:
    """Whoever asks for an instruction set gets it or an error, never tests of another one."""
    used = {
        "MLIP_KERNELS_CPU_CAPABILITY": instruction_sets.in_use(),
        "ATEN_CPU_CAPABILITY": torch.backends.cpu.get_cpu_capability().lower(),
    }
    for name, found in used.items():
        wanted = os.environ.get(name)
        if wanted and wanted != found:
            raise pytest.UsageError(f"{name}={wanted} was asked for, but {found or 'no kernel'} is what runs here")


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
