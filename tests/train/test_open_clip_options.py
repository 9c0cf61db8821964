"""Options of open_clip_train mean what they mean there, or the answer names ours."""

import shlex

import pytest

from mlip_kernels.train.__main__ import main, parse
from mlip_kernels.train.open_clip_options import ANSWERS, IMPLIED, RENAMED


def test_a_command_line_of_open_clip_is_understood():
    line = """
        --train-data pairs.csv --val-data=held-out.csv --csv-img-key image --csv-caption-key caption --batch-size 32
        --accum_freq 4 --lr 5e-4 --wd=0.2 --eps 1e-6 --warmup 100 --epochs 30 --workers 2 --grad-clip-norm 1.0
        --grad-checkpointing --precision amp_bf16 --local-loss --gather-with-grad --torchcompile --logs runs/x
        --report-to tensorboard,wandb --imagenet-val val --resume latest --dataset-type csv --log-every-n-steps 7
    """
    config = parse(shlex.split(line))
    taken = {
        "data": "pairs.csv",
        "held_out": "held-out.csv",
        "csv_image_key": "image",
        "csv_caption_key": "caption",
        "batch_size": 32,
        "accumulate": 4,
        "learning_rate": 5e-4,
        "weight_decay": 0.2,
        "epsilon": 1e-6,
        "warmup_steps": 100,
        "epochs": 30,
        "workers": 2,
        "clip_gradients": 1.0,
        "gradient_checkpointing": True,
        "precision": "bfloat16",
        "torchcompile": True,
        "output": "runs/x",
        "report_to": ("wandb",),
        "zeroshot": "val",
        "resume": True,
        "log_every": 7,
    }
    assert {name: getattr(config, name) for name in taken} == taken


@pytest.mark.parametrize("written", [["--resume", "a/step-1.pt"], ["--resume=a/step-1.pt"]])
def test_resume_takes_a_checkpoint(written):
    assert parse(written).resume_from == "a/step-1.pt"


@pytest.mark.parametrize("option", sorted(ANSWERS))
def test_what_has_no_counterpart_is_answered_in_one_line(option, capsys):
    assert main([f"--{option}", "3"]) == 2
    printed = capsys.readouterr().err
    assert printed == f"mlip-train: error: --{option}: an option of open_clip_train; here it is {ANSWERS[option]}\n"


def test_their_names_are_options_of_theirs(capsys):
    params = pytest.importorskip("open_clip_train.params", reason="needs open_clip's training script")
    with pytest.raises(SystemExit):
        params.parse_args(["--help"])
    printed = capsys.readouterr().out
    assert [name for name in (*RENAMED, *ANSWERS, *IMPLIED) if f"--{name}" not in printed] == []


def test_our_names_are_options_of_ours(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    printed = capsys.readouterr().out
    assert [name for name in RENAMED.values() if f"--{name}" not in printed] == []
