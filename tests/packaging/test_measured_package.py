"""Tests and benchmarks say which package they run on, and stop where it is not the one that was meant."""

import shutil
from pathlib import Path

import pytest

from mlip_kernels import _build_record

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clone(uncompiled):
    """A source folder in which nothing was compiled, as far as pytest needs it."""
    for name in ("tests", "benchmarks"):
        (uncompiled.folder / name).mkdir()
        shutil.copy(ROOT / name / "conftest.py", uncompiled.folder / name)
        (uncompiled.folder / name / "test_nothing.py").write_text("def test_nothing():\n    pass\n")
    return uncompiled


@pytest.fixture
def installed(clone):
    """A compiled package that stands behind the source folder on the path."""
    package = clone.folder / "site-packages" / "mlip_kernels"
    shutil.copytree(clone.package, package)
    (package / "_cpu.so").write_bytes(b"library")
    _build_record.write(package, {"cpu": "ok"})
    return package


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_a_clone_that_hides_the_installed_package_stops(clone, installed, folder):
    done = clone.run("-m", "pytest", "-p", "no:cacheprovider", folder, PYTHONPATH=str(installed.parent))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert f"It hides the package installed in {installed}" in done.stderr
    assert "`pytest`, not `python -m pytest`" in done.stderr


def test_benchmarks_stop_where_they_would_measure_the_reference(clone):
    done = clone.run("-m", "pytest", "-p", "no:cacheprovider", "benchmarks", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert "no compiled CPU kernels (not built)" in done.stderr


def test_the_header_names_the_package_its_version_and_its_parts(clone):
    both = ("-m", "pytest", "-p", "no:cacheprovider", "--import-mode=importlib", "tests", "benchmarks")
    done = clone.run(*both, MLIP_KERNELS_DISABLE_EXT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    headers = [line for line in done.stdout.splitlines() if line.startswith("mlip_kernels 0.")]
    assert len(headers) == 2
    for words in (str(clone.package), "CPU part: disabled by MLIP_KERNELS_DISABLE_EXT=1", "CUDA part: disabled"):
        assert all(words in header for header in headers)
