"""The CSV log survives interruption."""

import os
import signal
import subprocess
import sys
import types

import pytest

from mlip_kernels.train import logs


def test_rows_come_back(tmp_path):
    log = logs.Logs(tmp_path, first_step=1)
    log.write(10, {"loss": 0.1 + 0.2, "norm": 1e-9})
    log.close()
    assert logs.read(tmp_path / "metrics.csv") == [(10, "loss", 0.1 + 0.2), (10, "norm", 1e-9)]


def test_resuming_drops_rows_after_the_checkpoint_and_an_unfinished_row(tmp_path):
    log = logs.Logs(tmp_path, first_step=1)
    for step in (10, 20, 30):
        log.write(step, {"loss": float(step)})
    log.close()
    with log.path.open("a") as file:
        file.write("40,lo")
    resumed = logs.Logs(tmp_path, first_step=21)
    resumed.write(30, {"loss": 31.0})
    resumed.close()
    assert logs.read(log.path) == [(10, "loss", 10.0), (20, "loss", 20.0), (30, "loss", 31.0)]


def test_a_kill_right_after_resuming_keeps_every_row(tmp_path):
    log = logs.Logs(tmp_path, first_step=1)
    log.write(10, {"loss": 10.0})
    log.close()
    script = (
        "import os, pathlib, signal, sys\n"
        "from mlip_kernels.train import logs\n"
        "opened = logs.Logs(pathlib.Path(sys.argv[1]), first_step=11)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, env={**os.environ})
    assert killed.returncode == -signal.SIGKILL
    assert logs.read(log.path) == [(10, "loss", 10.0)]


def test_a_value_cut_short_is_no_value(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,name,value\r\n10,loss,2.5\r\n20,loss,1")  # of 1.25
    assert logs.read(path) == [(10, "loss", 2.5)]


def test_repeated_figures_replace_those_of_before(tmp_path):
    for value in (0.1, 0.2):
        log = logs.Logs(tmp_path, first_step=11, again=("recall",))
        log.write(10, {"recall": value})
        log.close()
    assert logs.read(log.path) == [(10, "recall", 0.2)]


@pytest.mark.parametrize("row", [b"x,loss,1", b"1,loss", b"1,loss,x", b"\xff,loss,1", b"1," + b"a" * 200_000])
def test_a_row_of_something_else_is_named(tmp_path, row):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,name,value\n1,loss,1.0\n" + row + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.csv, line 3: expected a step, a name and a value") as failure:
        logs.read(path)
    assert len(str(failure.value)) < 500


class Wandb(types.ModuleType):
    """As much of wandb as the trainer calls; ``runs`` is what it was told."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    def init(self, **options):
        scalars, told = [], types.SimpleNamespace(**options)
        told.scalars, told.id = scalars, options["id"] or f"id{len(self.runs)}"
        told.log = lambda values, step: scalars.append((step, values))
        told.finish = lambda: scalars.append("finished")
        self.runs.append(told)
        return told


def test_wandb_gets_the_same_scalars_and_a_resumed_run_continues_there(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (10, 20):
        run = logs.WandbRun(tmp_path / "run", "project", {"steps": 20})
        log = logs.Logs(tmp_path / "run", step, wandb=run)
        log.write(step, {"loss": 0.5})
        log.close()
    first, second = wandb.runs
    assert first.scalars == [(10, {"loss": 0.5}), "finished"]
    assert second.scalars == [(20, {"loss": 0.5}), "finished"]
    assert (first.id, second.id, second.resume) == ("id0", "id0", "allow")
    assert (first.project, first.name, first.config) == ("project", "run", {"steps": 20})


def test_an_absent_and_a_refusing_wandb_are_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="report_to: expected an installed wandb, found none: pip install wandb"):
        logs.WandbRun(tmp_path, "project", {})
    wandb = Wandb()
    monkeypatch.setattr(wandb, "init", lambda **options: (_ for _ in ()).throw(wandb.Error("no account")))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ValueError, match="report_to: wandb: no account; WANDB_MODE=offline"):
        logs.WandbRun(tmp_path, "project", {})
