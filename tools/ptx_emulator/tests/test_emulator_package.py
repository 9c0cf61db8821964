"""The package works by itself: it imports only what it declares, and a wheel of it holds all that it needs."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ptx_emulator import instructions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DECLARED = {
    "ptx_emulator": {"numpy", "pybind11"},
    "tests": {"numpy", "pytest", "torch", "triton", *(file.stem for file in HERE.glob("*.py"))},
}


def imported(folder: Path) -> set[str]:
    """The packages that the modules of a folder import, wherever in the module."""
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module or "")
    return {name.partition(".")[0] for name in found}


@pytest.mark.parametrize("folder", DECLARED)
def test_it_imports_only_what_it_declares(folder: str):
    unknown = imported(ROOT / folder) - sys.stdlib_module_names - {"ptx_emulator"} - DECLARED[folder]
    assert not unknown


def test_a_wheel_holds_all_that_it_needs(tmp_path: Path):
    """What is in it builds the emulator: the same, so that it is found in the cache."""
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools")
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    zipfile.ZipFile(source / done.stdout.split()[-1]).extractall(site)
    use = "import ptx_emulator as package; print(package.__file__, *package.instructions(), sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", use]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(site / "ptx_emulator" / "__init__.py"), *instructions()]
