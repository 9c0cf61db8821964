"""The command line says in one line what is wrong."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlip_kernels.train import PRESETS, __main__, loop, report
from mlip_kernels.train.__main__ import command, main, parse


def test_options_change_single_fields_of_a_preset():
    config = parse(["--preset", "vit-b-32", "--steps", "7", "--model.merging.keep-rate", "0.8"])
    assert (config.steps, config.model.merging.keep_rate) == (7, 0.8)
    assert config.model.image.patch_size == PRESETS["vit-b-32"].model.image.patch_size
    assert parse([]) == PRESETS["small"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "preset: expected one of small, vit-b-32, vit-b-16, finetune-vit-b-32, "),
        (["--data", "nothing.csv"], "nothing.csv"),
    ],
)
def test_a_bad_run_ends_with_one_line_that_says_why(arguments, message, capsys, tmp_path):
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("mlip-train: error: ")
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "pairs.xlsx"], "data: expected"),
        (["--batch-size", "0"], "batch_size: expected an integer >= 1, got 0"),
        (["--model.merging.keep-rate", "0.2"], "MergingConfig.keep_rate: expected a finite number in [0.5, 1.0]"),
        (["--model.image.patch-size", "7"], "ImageConfig.patch_size: expected a divisor of image_size=64, got 7"),
        (["--model.image.colour", "red"], "--model.image.colour"),
    ],
)
def test_a_bad_option_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_help_names_every_section():
    command = [sys.executable, "-m", "mlip_kernels.train", "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "160"})
    for option in ("--data", "--resume", "--operators", "--model.merging.keep-rate", "--model.loss.token-weight"):
        assert option in printed.stdout


def lines_of(config, monkeypatch, capsys) -> tuple[int, list[str]]:
    """Exit code of the command with ``config``, and what it says on standard error beside the progress bar."""
    monkeypatch.setattr(__main__, "parse", lambda _arguments: config)
    code = main([])
    printed = capsys.readouterr().err.replace("\r", "\n")
    assert "Traceback" not in printed
    return code, [line for line in printed.splitlines() if line.startswith("mlip-train: ") and "precision" not in line]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "file: File exists"),
        ("file/run", "file/run: Not a directory"),
        ("odd/metrics.csv", "metrics.csv: Is a directory"),
        (
            "odd/metrics.csv with another row",
            "metrics.csv, line 2: expected a step, a name and a value",
        ),
    ],
)
def test_an_output_that_cannot_be_used_is_named_in_one_line(tiny, tmp_path, monkeypatch, capsys, place, message):
    (tmp_path / "file").write_text("")
    output = tmp_path / place
    if place == "odd/metrics.csv":
        output.mkdir(parents=True)
        output = output.parent
    elif place.startswith("odd"):
        output = tmp_path / "odd"
        output.mkdir()
        (output / "metrics.csv").write_text("step,name,value\nx,loss,1\n")
    code, (line,) = lines_of(dataclasses.replace(tiny, output=str(output)), monkeypatch, capsys)
    assert code == 2
    assert line.startswith("mlip-train: error: /")
    assert message in line


def test_an_error_in_a_step_has_a_line_of_its_own(tiny, monkeypatch, capsys):
    def fail(_run, _batches):
        raise OSError(5, "Input/output error", "picture.png")

    monkeypatch.setattr(loop.Run, "_optimise", fail)
    assert lines_of(tiny, monkeypatch, capsys) == (2, ["mlip-train: error: picture.png: Input/output error"])


@pytest.fixture
def interruptible():
    """A process that a shell has started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("phase", "number", "by", "left"),
    [
        ("evaluate", 1, signal.SIGTERM, "before anything was saved"),
        ("evaluate", 2, signal.SIGINT, "step-00000001.pt is saved"),
        ("report", 1, signal.SIGTERM, "--resume"),
    ],
    ids=["evaluation before", "evaluation after", "report"],
)
def test_a_signal_outside_of_the_steps_ends_in_one_line(tiny, monkeypatch, capsys, phase, number, left, by):
    owner, name = (loop, "evaluate") if phase == "evaluate" else (report, "write_report")
    call, calls = getattr(owner, name), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            os.kill(os.getpid(), by)
        return call(*arguments)

    monkeypatch.setattr(owner, name, interrupted)
    code, (line,) = lines_of(dataclasses.replace(tiny, steps=1), monkeypatch, capsys)
    assert code == 130
    assert line.startswith("mlip-train: stopped: ")
    assert left in line


def test_a_report_that_fails_is_a_warning(tiny, monkeypatch, capsys):
    def fail(_outcome, _config):
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr(report, "write_report", fail)
    code, (line,) = lines_of(dataclasses.replace(tiny, steps=1), monkeypatch, capsys)
    assert code == 0
    assert line == "mlip-train: warning: the run is finished, but its report could not be drawn: no font at all"


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main([]) == 2
    assert capsys.readouterr().err == (
        "mlip-train: error: mlip-train needs the package 'tyro', which is not installed: "
        "pip install 'mlip_kernels[train]'\n"
    )


@pytest.mark.parametrize("package", ["timm", "open_clip"])
def test_models_and_the_command_name_the_extra_where_it_is_missing(package):
    script = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from mlip_kernels.train.__main__ import main\n"
        "assert main(['--help']) == 2\n"
        "try:\n    import mlip_kernels.models\n"
        "except ImportError as failure:\n    print(failure, file=sys.stderr)\n"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    remedy = f"needs the package {package!r}, which is not installed: pip install 'mlip_kernels[train]'"
    first, second = finished.stderr.splitlines()
    assert first == f"mlip-train: error: mlip_kernels.models {remedy}"
    assert second == f"mlip_kernels.models {remedy}"


def test_the_command_lets_openmp_threads_sleep_unless_told_otherwise(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(__main__, "main", lambda: 0)
    for variable in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(variable, raising=False)
    assert command() == 0
    ((executable, arguments, environment),) = started
    assert arguments == [executable, *sys.orig_argv[1:]]
    assert environment == {**os.environ, "OMP_WAIT_POLICY": "passive"}
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert command() == 0
    assert len(started) == 1


def test_a_caption_with_dollar_signs_is_text_in_the_report(tiny, pairs, monkeypatch, capsys):
    odd = pairs.with_name("dollars.csv")
    lines = pairs.read_text().splitlines()
    odd.write_text("\n".join([lines[0], *(line.replace("\t", "\t$a_b_c$ \\foo ") for line in lines[1:])]) + "\n")
    assert lines_of(dataclasses.replace(tiny, steps=1, data=str(odd)), monkeypatch, capsys) == (0, [])
    assert (Path(tiny.output) / "report.png").read_bytes().startswith(b"\x89PNG")
