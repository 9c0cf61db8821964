"""The build backend asks for what the environment lacks, and for nothing else."""

import importlib.util
import sys
from pathlib import Path

import pytest

BUILD = Path(__file__).resolve().parents[2] / "_build"


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.delenv("MLIP_KERNELS_SKIP_EXT", raising=False)
    monkeypatch.syspath_prepend(BUILD)  # as backend-path of pyproject.toml does
    path = BUILD / "backend.py"
    spec = importlib.util.spec_from_file_location("mlip_kernels_build_backend", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def environment(tmp_path, backend, monkeypatch):
    """``environment(torch="2.10.1", ...)`` makes the backend see these versions and no others."""

    def install(*folders):
        path = []
        for number, versions in enumerate(folders):
            folder = tmp_path / str(number)
            for name, version in versions.items():
                (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
                metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
                metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            path.append(str(folder))
        monkeypatch.setattr(backend, "PATH", path)

    return install


@pytest.mark.parametrize(
    ("folders", "asked_for"),
    [
        ([{"torch": "2.10.0", "setuptools": "77.0.3"}], []),
        ([{"torch": "2.14.1+cu130", "setuptools": "84.2.1"}], []),
        ([{"torch": "3.0.0a0+git1", "setuptools": "77.0"}], []),
        ([{"setuptools": "80.0"}], ["torch>=2.10"]),
        ([{"torch": "2.9.1", "setuptools": "65.5.0"}], ["setuptools>=77.0", "torch>=2.10"]),
        ([{"setuptools": "80.0"}, {"setuptools": "65.5.0", "torch": "2.11.0"}], []),  # isolated first, then the host
        ([{}], ["setuptools>=77.0", "torch>=2.10"]),
    ],
)
def test_only_what_is_missing_is_asked_for(backend, environment, folders, asked_for):
    environment(*folders)
    assert backend.get_requires_for_build_wheel() == asked_for
    assert backend.get_requires_for_build_editable() == asked_for


def test_nothing_to_compile_needs_no_torch(backend, environment, monkeypatch):
    environment({"setuptools": "80.0"})
    monkeypatch.setenv("MLIP_KERNELS_SKIP_EXT", "1")
    assert backend.get_requires_for_build_wheel() == backend.get_requires_for_build_editable() == []
    monkeypatch.setenv("MLIP_KERNELS_SKIP_EXT", "yes")
    with pytest.raises(ValueError, match="MLIP_KERNELS_SKIP_EXT: expected '1' or '0', got 'yes'"):
        backend.get_requires_for_build_wheel()


def test_an_sdist_needs_no_torch(backend, environment):
    environment({"setuptools": "80.0"})
    assert backend.get_requires_for_build_sdist() == []


def test_a_build_without_isolation_names_the_setuptools_it_lacks(backend, environment, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    environment({"setuptools": "65.5.0"})
    with pytest.raises(RuntimeError, match=r"needs setuptools>=77.0; pip install --upgrade setuptools"):
        backend.build_sdist("nowhere")


def test_the_path_of_the_host_is_seen_from_behind_isolation(backend, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/what/isolation/puts/in/front")
    assert "/what/isolation/puts/in/front" not in backend.host_path()
    assert any("site-packages" in entry for entry in backend.host_path())
