"""The script for the first hour on a GPU, tried without one: its phases, deadlines, alarms and conclusions."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "gpu_check"
sys.path.insert(0, str(TOOL))

from gpu_check import __main__ as script  # noqa: E402
from gpu_check import correctness, record, report  # noqa: E402

from mlip_kernels import _cuda_choices  # noqa: E402


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TOOL), str(ROOT / "tests"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gpu_check", "--output", str(folder), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_run_on_the_cpu(tmp_path: Path):
    phases = ("machine", "capture-triton", "times-triton")
    done = start(tmp_path, "--device", "cpu", "--phases", *phases, "--only", "weighted_mean")
    assert done.returncode == 0, done.stdout + done.stderr
    results = record.read(tmp_path / "results.jsonl")
    assert {result["phase"] for result in results} == set(phases)
    assert all(f"| {phase} | well |" in done.stdout for phase in phases)
    rights = [result for result in results if result["phase"] == "capture-triton"]
    assert len(rights) == 2
    assert all(result["right"] for result in rights)
    assert (tmp_path / "report.md").read_text() == done.stdout[: len((tmp_path / "report.md").read_text())]
    assert (tmp_path / "cuda_choices.json").read_text() == _cuda_choices.PATH.read_text()  # no GPU was timed
    timed = [result for result in results if result["phase"] == "times-triton"]
    for result in timed:
        trained = result["direction"] != "forward"
        assert ("merging_weighted_mean" in result["primitives"]) or trained
        assert ("merging_weighted_mean_backward" in result["primitives"]) == trained


def test_every_row_of_the_table_is_asked_for(tmp_path: Path):
    recorder, found = record.Recorder(tmp_path / "results", "correctness-cuda"), tmp_path / "results"
    correctness.run(recorder, torch.device("cpu"), only="weighted_mean")
    names = [result["name"] for result in record.read(found)]
    assert all(result["right"] for result in record.read(found))
    assert names == [
        name for name, _ in correctness.table(torch.device("cpu"), *correctness.DTYPES) if "weighted" in name
    ]


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = start(tmp_path)
    assert done.returncode == 2
    assert "no GPU that PyTorch can use; --device cpu" in done.stderr


def test_a_phase_that_hangs_or_dies_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ends = {"machine": "import time; time.sleep(60)", "models": "import os; os.abort()", "compiled": "pass"}
    run = subprocess.run
    monkeypatch.setattr(script, "PHASES", dict.fromkeys(ends, 1))
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: run([sys.executable, "-c", ends[command[4]]], **options)
    )
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--output", str(tmp_path)])
    assert script.main() == 1
    page = (tmp_path / "report.md").read_text()
    assert "| machine | after its 1 seconds | 0 | 0 |" in page
    assert "| models | with exit code -6 | 0 | 0 |" in page
    assert "| compiled | well | 0 | 0 |" in page


def test_a_case_that_fails_or_takes_too_long_is_told_and_the_next_one_runs(tmp_path: Path):
    recorder = record.Recorder(tmp_path / "results", "phase")
    with recorder.case("wrong"):
        raise ValueError("bits differ")
    with recorder.case("slow", seconds=1):
        time.sleep(5)
    with recorder.case("good") as facts:
        facts["right"] = True
    with (tmp_path / "results").open("a") as file:
        file.write('{"phase": "phase", "na')
    wrong, slow, good = record.read(tmp_path / "results")
    assert wrong["error"].startswith("ValueError: bits differ (test_gpu_check.py:")
    assert slow["error"].startswith("TimeoutError")
    assert good["right"]
    assert "error" not in good


def timed(
    backend: str, seconds: float, eager: float, *, arch: str = "sm_90", dtype: str = "bfloat16", more: float = 0.0
) -> list[dict[str, object]]:
    """A call that takes so many seconds, and ``more`` with gradients, which run another operator."""
    named = {"phase": f"times-{backend}", "workload": "dct, grid", "operator": "dct", "arch": arch, "dtype": dtype}
    results = []
    for direction, longer in (("forward", 0.0), ("forward and backward", more)):
        kernels, plain = ({"device": each + longer, "host": 0.0} for each in (seconds, eager))
        ran = ["spectral_separable", *(["spectral_filtered"] if longer else [])]
        result = {**named, "name": f"dct, {dtype}, {direction}", "direction": direction, "primitives": ran}
        results.append({**result, "kernels": kernels, "eager": plain})
    return results if more else results[:1]


def row(*choices: str, basis: str = "modelled") -> dict[str, str]:
    float32, float16, bfloat16 = choices
    return {"float32": float32, "float16": float16, "bfloat16": bfloat16, "basis": basis, "date": "2026-01-02"}


TABLE = {"sm_80": {"spectral_separable": row(*["triton"] * 3), "spectral_analysis": row(*["cuda"] * 3)}}


@pytest.mark.parametrize(
    ("triton", "cuda", "eager", "wrong", "choice"),
    [
        (1.0, 2.0, 3.0, None, "triton"),
        (1.05, 1.0, 3.0, None, "triton"),  # not clearly slower
        (2.0, 1.0, 3.0, None, "cuda"),
        (2.0, 1.0, 3.0, "cuda", "triton"),
        (2.0, 2.0, 1.0, None, "plain"),
        (1.0, 1.0, 3.0, "both", "plain"),
    ],
)
def test_the_choice_is_the_faster_backend_that_is_right(
    triton: float, cuda: float, eager: float, wrong: str | None, choice: str
):
    results = [*timed("triton", triton, eager), *timed("cuda", cuda, eager)]
    for backend in ("triton", "cuda"):
        if wrong in (backend, "both"):
            results.append({"phase": f"correctness-{backend}", "name": "dct, grid, float32", "error": "differs"})
    found = report.choices(results, TABLE, "2026-01-02")
    assert found == {**TABLE, "sm_90": {"spectral_separable": row("triton", choice, choice, basis="measured")}}


def test_gradients_choose_for_the_operators_that_only_they_run():
    results = [*timed("triton", 1.0, 9.0, more=2.0), *timed("cuda", 2.0, 9.0, more=1.0)]
    results += [
        *timed("triton", 1.0, 9.0, more=2.0, dtype="float32"),
        *timed("cuda", 2.0, 9.0, more=1.0, dtype="float32"),
    ]
    found = report.choices(results, TABLE, "2026-01-02")["sm_90"]
    assert found["spectral_separable"] == row(*["triton"] * 3, basis="measured")
    assert found["spectral_filtered"] == row(*["cuda"] * 3, basis="measured")


def test_what_ran_on_no_gpu_chooses_nothing():
    assert report.choices(timed("triton", 1.0, 0.1, arch="cpu"), TABLE, "2026-01-02") == TABLE
