"""What is built: nothing twice, also where names have spaces, and without machine code a wheel for every machine."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from mlip_kernels import _build_record

ROOT = Path(__file__).resolve().parents[2]
SOURCE = {
    "kernels/one.cpp": '#include "a header.h"\nint one() { return ONE; }\n',
    "kernels/a header.h": '#include "dollar$ and #.h"\n',
    "kernels/dollar$ and #.h": "#define ONE 1\n",
}


@pytest.fixture
def compilers(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "_build")
    import compilers

    return compilers


@pytest.fixture
def compiled(compilers, monkeypatch, tmp_path):
    """``compiled()`` compiles one source in a folder with a space, and says whether the compiler ran."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path / "a folder"
    for name, text in SOURCE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    ran = []
    run = compilers.run
    monkeypatch.setattr(compilers, "run", lambda command: (ran.append(command), run(command)))

    def compile_it(*flags):
        ran.clear()
        target = folder / "build" / "one.cpp.o"
        compilers.compile_one(["c++", *flags], folder / "kernels" / "one.cpp", target)
        assert target.exists()
        return bool(ran)

    compile_it.folder = folder
    return compile_it


def test_a_path_with_spaces_recompiles_nothing(compiled):
    assert compiled()
    assert not compiled()


@pytest.mark.parametrize("name", SOURCE)
def test_what_an_object_was_made_from_recompiles_it(compiled, name):
    assert compiled()
    later = (compiled.folder / "build" / "one.cpp.o").stat().st_mtime + 10
    os.utime(compiled.folder / name, (later, later))
    assert compiled()


def test_other_flags_recompile(compiled):
    assert compiled()
    assert compiled("-O2")
    assert not compiled("-O2")


@pytest.mark.parametrize(
    ("rule", "files"),
    [
        ("a.o: a.cpp\n", ["a.cpp"]),
        ("a.o: a.cpp \\\n b.h \\\n  c.h\n", ["a.cpp", "b.h", "c.h"]),
        ("/x\\ y/a.o: /x\\ y/a.cpp \\\n /x\\ y/two\\ \\ spaces.h", ["/x y/a.cpp", "/x y/two  spaces.h"]),
        ("a.o: cost$$.h n\\#1.h", ["cost$.h", "n#1.h"]),
        ("a.o:", []),
    ],
)
def test_rules_for_make_are_read_as_compilers_write_them(compilers, rule, files):
    assert compilers.prerequisites(rule) == [Path(name) for name in files]


def build(source, *arguments, **variables):
    """``python -c "import backend; ..."`` in a source folder, as pip does it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLIP_KERNELS_")}
    environment |= {"PYTHONPATH": str(source / "_build"), **variables}
    code = f"import backend; print(backend.{arguments[0]}({', '.join(map(repr, arguments[1:]))}))"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def source(tmp_path):
    """A copy of the source tree, in a folder with a space."""
    folder = tmp_path / "source tree"
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "*.unfinished")
    for name in ("mlip_kernels", "_build", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_without_machine_code_the_wheel_fits_every_machine(source, tmp_path):
    (source / "build" / "lib" / "mlip_kernels").mkdir(parents=True)
    (source / "build" / "lib" / "mlip_kernels" / "_cpu.so").write_bytes(b"of an older build")
    done = build(source, "build_wheel", str(tmp_path), MLIP_KERNELS_SKIP_EXT="1")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        record = packed.read("mlip_kernels/_build.json").decode()
        metadata, kind = (
            packed.read(next(name for name in names if name.endswith(end))).decode() for end in ("METADATA", "/WHEEL")
        )
    assert "skipped by MLIP_KERNELS_SKIP_EXT=1" in record
    assert {"mlip_kernels/py.typed", "mlip_kernels/cuda_choices.json"} <= set(names)
    assert not [name for name in names if name.endswith(".so")]
    assert "Classifier: Typing :: Typed" in metadata
    assert "Root-Is-Purelib: true" in kind


def test_spaces_in_the_paths_of_source_and_torch_build_and_rebuild_nothing(source, tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    for file in source.glob("csrc/**/*.cpp"):  # one is enough
        if file.name != "simd.cpp":
            file.unlink()
    packages = tmp_path / "site packages"
    packages.mkdir()
    (packages / "torch").symlink_to(Path(torch.__file__).parent)
    path = os.pathsep.join(map(str, (source / "_build", packages)))
    compiled_at = []
    for turn in ("first", "second"):
        done = build(
            source, "build_wheel", str(tmp_path / turn), FORCE_CUDA="0", MLIP_KERNELS_STRICT="1", PYTHONPATH=path
        )
        assert done.returncode == 0, done.stderr
        (wheel,) = (tmp_path / turn).glob("*.whl")
        assert "-py3-none-linux_" in wheel.name
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(tmp_path / turn)
        assert _build_record.damage(tmp_path / turn / "mlip_kernels", "cpu") == ""
        (built,) = source.glob("build/**/simd.cpp.o")
        compiled_at.append(built.stat().st_mtime_ns)
    assert compiled_at[0] == compiled_at[1]


@pytest.mark.parametrize(("name", "value"), [("MLIP_KERNELS_STRICT", "true"), ("FORCE_CUDA", "yes")])
def test_a_build_stops_at_a_variable_that_it_does_not_understand(source, tmp_path, name, value):
    variables = {"MLIP_KERNELS_SKIP_EXT": "1", name: value}
    done = build(source, "build_wheel", str(tmp_path), **variables)
    assert done.returncode != 0
    assert f"{name}: expected '1' or '0', got '{value}'" in done.stderr
