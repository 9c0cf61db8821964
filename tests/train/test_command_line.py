"""The command line says in one line what is wrong."""

import os
import subprocess
import sys

import pytest

from mlip_kernels.train import PRESETS
from mlip_kernels.train.__main__ import main, parse


def test_options_change_single_fields_of_a_preset():
    config = parse(["--preset", "vit-b-32", "--steps", "7", "--model.merging.keep-rate", "0.8"])
    assert (config.steps, config.model.merging.keep_rate) == (7, 0.8)
    assert config.model.image.patch_size == PRESETS["vit-b-32"].model.image.patch_size
    assert parse([]) == PRESETS["small"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "preset: expected one of small, vit-b-32, vit-b-16, got 'huge'"),
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
