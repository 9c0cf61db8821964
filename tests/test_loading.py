"""Loading of compiled parts: damaged files, hidden packages, importing twice."""

import json
import shutil
import subprocess
import sys

import pytest

import mlip_kernels
from mlip_kernels import _build_record, _loading
from mlip_kernels._loading import LOADED, PACKAGE

compiled = pytest.mark.skipif(LOADED["cpu"] != "ok", reason="needs the compiled CPU part: pip install .")

IMPORT_EACH_DAMAGE = """
import json, os, shutil, signal, sys, warnings
import torch
package, good, record = sys.argv[1:]
library, noted = os.path.join(package, "_cpu.so"), os.path.join(package, "_build.json")
content, record = open(good, "rb").read(), open(record).read()
size = len(content)


def flipped(i):
    return content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :]


lengths = (0, 1, 63, 64, 4095, 4096, size // 4, size // 2, size - 4097, size - 1)
damages = {f"cut after {n} bytes": content[:n] for n in lengths}
damages |= {f"byte {i} of the header flipped": flipped(i) for i in range(0, 64, 5)}
damages |= {"longer": content + b"x", "text": b"not a library", "zeros at the end": content[:-70000] + bytes(70000)}
records = {"no record": None, "record cut": record[: len(record) // 2], "record of another kind": "[1]"}
records |= {"old record": '{"cpu": "ok"}', "odd record": '{"cpu": "ok", "files": {"_cpu.so": {"bytes": "many"}}}'}
kinds = {"folder": os.mkdir, "pipe": os.mkfifo, "link to nothing": lambda path: os.symlink("nowhere", path)}


def use():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        import mlip_kernels
        for _ in range(2):
            mlip_kernels.weighted_mean(torch.ones(1, 2, 3))
    return mlip_kernels._library.LOADED["cpu"], [str(w.message) for w in seen if "mlip_kernels" in str(w.message)]


def in_a_child(case):
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with os.fdopen(reading) as answer:
            said = answer.read()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), json.loads(said or "null")
    signal.alarm(30)
    with os.fdopen(writing, "w") as answer:
        json.dump(use(), answer)
    os._exit(0)


outcomes = {}
for case in ["whole", *damages, *records, *kinds]:
    shutil.rmtree(library) if os.path.isdir(library) else os.path.lexists(library) and os.remove(library)
    if case in kinds:
        kinds[case](library)
    else:
        open(library, "wb").write(damages.get(case, content))
    if (text := records.get(case, record)) is not None:
        open(noted, "w").write(text)
    else:
        os.remove(noted)
    outcomes[case] = in_a_child(case)
print(json.dumps(outcomes))
"""

IMPORT_TWICE = """
import sys, warnings
import torch
import mlip_kernels as first
x, weight = torch.randn(2, 7, 8, requires_grad=True), torch.rand(2, 7)


def run(package):
    y = package.dct(package.weighted_mean(x, weight)[:, None])
    return y, *torch.autograd.grad(y.square().sum(), x)


expected = run(first)
for _ in range(2):
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlip_kernels"]:
        del sys.modules[name]
    with warnings.catch_warnings(action="error") if sys.version_info >= (3, 11) else warnings.catch_warnings():
        import mlip_kernels as again
    assert again.dct is not first.dct
    for package in (again, first):
        assert all(map(torch.equal, run(package), expected))
    assert torch.ops.mlip_kernels.spectral_dct_matrix is not None
    fakes = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mlip_kernels.merging_weighted_mean.default, (x, weight, 1), test_utils=fakes)
"""


@compiled
def test_a_damaged_library_is_never_loaded_and_one_warning_names_it_and_the_remedy(uncompiled):
    arguments = (uncompiled.package, PACKAGE / "_cpu.so", PACKAGE / "_build.json")
    done = uncompiled.run("-c", IMPORT_EACH_DAMAGE, *map(str, arguments), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes.pop("whole") == [0, ["ok", []]]
    assert len(outcomes) > 30
    crashed = {case: status for case, (status, _) in outcomes.items() if status != 0}
    assert not crashed
    for case, (_, (loaded, warned)) in outcomes.items():
        assert loaded == "the file is missing" if case == "link to nothing" else loaded.startswith("damaged: "), case
        (warning,) = warned
        assert loaded in warning
        assert "pip install --force-reinstall" in warning
        assert case == "link to nothing" or str(uncompiled.package / "_cpu.so") in warning


def test_an_unreadable_library_is_damaged(tmp_path, monkeypatch):
    library = tmp_path / "_cpu.so"
    library.write_bytes(b"content")
    _build_record.write(tmp_path, {"cpu": "ok"})
    assert _build_record.damage(tmp_path, "cpu") == ""

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(library), "open", denied)
    monkeypatch.setattr(_build_record, "read", lambda _: {"files": {"_cpu.so": {"bytes": 7, "crc32": 0}}})
    assert _build_record.damage(tmp_path, "cpu") == f"{library} cannot be read: Permission denied"


@pytest.mark.parametrize("size", [0, 1, 65536, 65537, 2 << 20, (2 << 20) + 1, 5_000_001])
def test_the_checksum_covers_first_and_last_byte_and_every_hole(tmp_path, size):
    file = tmp_path / "library"
    content = bytes(i % 251 for i in range(1, 252)) * (size // 251 + 1)
    file.write_bytes(content[:size])
    whole = _build_record.fingerprint(file)
    assert whole["bytes"] == size
    hole = max(1, 2 * size // _build_record.MOST_BLOCKS)
    for start in sorted({0, size // 3, max(0, size - hole)} if size else ()):
        file.write_bytes(content[:start] + bytes(min(hole, size - start)) + content[start + hole : size])
        changed = _build_record.fingerprint(file)
        assert changed["bytes"] == size
        assert changed["crc32"] != whole["crc32"], start


def test_packagers_can_record_a_rewritten_library(uncompiled):
    (uncompiled.package / "_cpu.so").write_bytes(b"stripped")
    (uncompiled.package / "_build.json").write_text('{"cpu": "ok", "torch": "2.10", "files": {}}')
    assert "is not recorded" in _build_record.damage(uncompiled.package, "cpu")
    done = uncompiled.run(str(uncompiled.package / "_build_record.py"))
    assert done.returncode == 0, done.stderr
    assert _build_record.damage(uncompiled.package, "cpu") == ""
    assert _build_record.read(uncompiled.package)["torch"] == "2.10"


def test_a_package_that_hides_a_compiled_one_says_so(uncompiled, tmp_path):
    installed = tmp_path / "site-packages" / "mlip_kernels"
    shutil.copytree(uncompiled.package, installed)
    (installed / "_cpu.so").write_bytes(b"library")
    _build_record.write(installed, {"cpu": "ok", "cuda": "no nvcc was found"})
    code = """
import torch, mlip_kernels, mlip_kernels.env
mlip_kernels.weighted_mean(torch.ones(1, 2, 3))
print(mlip_kernels.env.report())
"""
    done = uncompiled.run("-c", code, PYTHONPATH=f"{uncompiled.folder}:{installed.parent}")
    assert done.returncode == 0, done.stderr
    said = f"It hides the package installed in {installed}, which has them."
    assert said in done.stderr
    assert "force-reinstall" not in done.stderr
    assert f"{installed} has parts that this one lacks" in done.stdout


def test_a_package_with_a_compiled_part_hides_nothing(uncompiled, monkeypatch):
    (uncompiled.package / "_cuda.so").write_bytes(b"library")
    _build_record.write(uncompiled.package, {"cpu": "no C++ compiler", "cuda": "ok"})
    monkeypatch.setattr(_loading, "DISABLED", False)
    monkeypatch.setattr(sys, "path", [*sys.path, str(uncompiled.folder)])
    monkeypatch.setattr(_loading, "LOADED", {"cpu": "not built", "cuda": "not built"})
    assert _loading.hidden_package() == uncompiled.package.resolve()
    monkeypatch.setattr(_loading, "LOADED", {"cpu": "ok", "cuda": "skipped by FORCE_CUDA=0 when the package was built"})
    assert _loading.hidden_package() is None
    assert _loading.hiding() == ""


def test_importing_again_defines_every_operator_again():
    done = subprocess.run([sys.executable, "-c", IMPORT_TWICE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_packages_are_imported_when_they_are_first_used():
    code = """
import sys, mlip_kernels as mk
lazy = {f"mlip_kernels.{name}" for name in ("data", "models", "nn", "patch", "train")}
assert not lazy & set(sys.modules)
assert {"models", "nn", "patch", "testing"} <= set(dir(mk))
mk.nn.ClipLoss, mk.patch, mk.testing
assert lazy & set(sys.modules) == {"mlip_kernels.nn", "mlip_kernels.patch"}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "meant"),
    [("weighted_means", "weighted_mean"), ("merge_token", "merge_tokens"), ("patches", "patch"), ("dctt", "dct")],
)
def test_a_misspelt_name_is_answered_with_the_right_one(name, meant):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'; did you mean '{meant}'\\?"):
        getattr(mlip_kernels, name)


def test_a_name_that_resembles_none_gets_no_suggestion():
    for name in ("zzzz", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'$"):
            getattr(mlip_kernels, name)
