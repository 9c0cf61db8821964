"""What a resumed run may change, what it refuses, and what it falls back on."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from mlip_kernels.testing import threads
from mlip_kernels.train import checkpoint, resume, train
from mlip_kernels.train.config import TrainConfig
from mlip_kernels.train.resume import Circumstances

HERE = Circumstances(data="abc", world_size=2, precision="float32", device="cpu", threads=1, torch="2.10.0")


@pytest.fixture
def saved(tiny, tmp_path):
    """A configuration, and checkpoints of steps 3 and 6 that it made, without training."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (3, 6):
        state = {
            "step": step,
            "model": {},
            "optimizer": {},
            "before": {},
            "config": tiny.to_dict(),
            "circumstances": HERE._asdict(),
            "history": [],
        }
        checkpoint.save(folder, step, state, keep=2)
    return tiny, checkpoint.checkpoints(folder)


def changed(config, **options):
    return dataclasses.replace(config, resume=True, **options)


def test_every_option_is_sorted(tiny):
    sorted_options = [resume.WITHOUT_EFFECT, resume.TAKEN, resume.OF_THE_DATA]
    assert len(set().union(*sorted_options)) == sum(map(len, sorted_options))
    refused = {"model", "batch_size", "samples_per_epoch", "accumulate", "seed", "pretrained"}
    refused |= {"lock_image", "lock_image_unlocked_groups", "lock_text", "lock_text_unlocked_layers"}
    assert set().union(*sorted_options) | refused == {field.name for field in dataclasses.fields(TrainConfig)}


def test_nothing_is_said_where_nothing_changes(saved):
    config, paths = saved
    options = {"log_every": 1, "evaluate_every": 5, "checkpoint_every": 9, "keep_checkpoints": 1, "workers": 1}
    assert resume.load(paths[-1], changed(config, **options), HERE).changes == []


@pytest.mark.parametrize(
    ("options", "here", "said"),
    [
        ({"learning_rate": 0.5}, {}, "learning_rate was 0.003, now 0.5"),
        ({"steps": 20}, {}, "steps was 8, now 20"),
        ({"data": "elsewhere/pairs.csv"}, {}, "now 'elsewhere/pairs.csv' (the same pairs)"),
        ({"allow_other": ("data",)}, {"data": "def"}, "other pairs than before"),
        ({"batch_size": 12, "allow_other": ("world_size",)}, {"world_size": 1}, "world_size was 2, now 1"),
        ({}, {"precision": "bfloat16"}, "precision was 'float32', now 'bfloat16'"),
        ({}, {"threads": 4}, "threads was 1, now 4"),
    ],
)
def test_what_changes_results_is_said(saved, options, here, said):
    config, paths = saved
    (change,) = resume.load(paths[-1], changed(config, **options), HERE._replace(**here)).changes
    assert said in change


@pytest.mark.parametrize(
    ("options", "here", "message"),
    [
        ({"seed": 1}, {}, "seed was 0, now 1"),
        ({"batch_size": 7}, {}, "batch_size was 6, now 7"),
        ({}, {"data": "def"}, "--allow-other data"),
        ({"held_out_pairs": 11}, {"data": "def"}, "held_out_pairs was 12, now 11, other pairs"),
        ({"batch_size": 12}, {"world_size": 1}, "--allow-other world_size"),
        ({"allow_other": ("world_size",)}, {"world_size": 1}, "world_size × batch_size was 12, now 6"),
        ({"steps": 5}, {}, "steps: expected at least 6"),
    ],
)
def test_what_would_be_another_run_is_refused(saved, options, here, message):
    config, paths = saved
    with pytest.raises(ValueError, match=message) as failure:
        resume.load(paths[-1], changed(config, **options), HERE._replace(**here))
    assert paths[-1].name in str(failure.value)


def test_another_model_is_named_by_its_options(saved):
    config, paths = saved
    wider = dataclasses.replace(config.model, embed_dim=32)
    with pytest.raises(ValueError, match=r"model\.embed_dim was 16, now 32$"):
        resume.load(paths[-1], changed(config, model=wider), HERE)


@pytest.mark.parametrize("missing", [*resume.FORM, None])
def test_an_incomplete_checkpoint_is_named_and_the_one_before_offered(saved, missing):
    config, paths = saved
    state = checkpoint.load(paths[-1])
    state = {} if missing is None else {name: value for name, value in state.items() if name != missing}
    checkpoint.save(paths[-1].parent, 6, state, keep=2)
    with pytest.raises(ValueError, match=rf"{paths[1].name}: not a checkpoint .* --resume-from .*{paths[0].name}"):
        resume.load(paths[-1], changed(config), HERE)


def test_a_checkpoint_to_continue_from_is_looked_for(saved, tmp_path):
    config, paths = saved
    assert resume.find(changed(config)) == paths[-1]
    assert resume.find(dataclasses.replace(config, resume_from=str(paths[0]))) == paths[0]
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint: .*step-00000005\.pt; .* has step-00000003\.pt"):
        resume.find(dataclasses.replace(config, resume_from=str(paths[0].with_name("step-00000005.pt"))))
    other = tmp_path / "other" / paths[0].name
    shutil.copytree(paths[0].parent, other.parent)
    with pytest.raises(ValueError, match="holds another run"):
        resume.find(dataclasses.replace(config, resume_from=str(other)))
    with pytest.raises(ValueError, match="overwrite"):
        dataclasses.replace(config, resume_from=str(other), overwrite=True)


def test_a_damaged_checkpoint_is_left_for_the_one_before_on_request(tiny, capsys):
    train(tiny)
    newest = checkpoint.checkpoints(Path(tiny.output) / "checkpoints")[-1]
    expected = checkpoint.load(newest)["model"]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"step-00000008\.pt: .* damaged.*--resume-from (\S*step-00000006\.pt)"
    ) as failure:
        train(changed(tiny))
    offered = str(failure.value).partition("--resume-from ")[2].partition(" ")[0]
    train(dataclasses.replace(tiny, resume_from=offered))
    assert "renamed a newer checkpoint to " in capsys.readouterr().err
    assert newest.with_name(newest.name + ".aside").read_bytes() == content
    assert all(map(torch.equal, checkpoint.load(newest)["model"].values(), expected.values()))


def test_a_lower_learning_rate_is_used_said_and_recorded(tiny, capsys):
    train(dataclasses.replace(tiny, steps=3))
    config = changed(tiny, learning_rate=1e-5, weight_decay=0.7)
    train(config)
    assert "learning_rate was 0.003, now 1e-05" in capsys.readouterr().err
    state = checkpoint.load(checkpoint.checkpoints(Path(tiny.output) / "checkpoints")[-1])
    (entry,) = state["history"]
    assert entry["step"] == 3
    assert any("learning_rate" in change for change in entry["changes"])
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.7
    assert state["optimizer"]["param_groups"][0]["lr"] <= 1e-5


def test_weights_that_do_not_fit_are_named_in_one_line(tiny):
    train(dataclasses.replace(tiny, steps=3))
    path = checkpoint.checkpoints(Path(tiny.output) / "checkpoints")[-1]
    state = checkpoint.load(path)
    state["model"].pop("visual_projection.weight")
    checkpoint.save(path.parent, 3, state, keep=2)
    with pytest.raises(ValueError, match=rf"{path.name}: .*visual_projection\.weight") as failure:
        train(changed(tiny))
    assert "\n" not in str(failure.value)


def test_an_edited_csv_and_a_moved_one_are_told_apart(tiny, pairs, tmp_path, capsys):
    config = dataclasses.replace(tiny, steps=3)
    train(config)
    moved = tmp_path / "moved"
    shutil.copytree(pairs.parent, moved)
    config = changed(tiny, data=str(moved / "pairs.csv"), steps=5)
    with threads(1):
        assert train(config).steps == 5
    assert "(the same pairs)" in capsys.readouterr().err
    lines = (moved / "pairs.csv").read_text().splitlines()
    (moved / "pairs.csv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    with pytest.raises(ValueError, match="other pairs than before"):
        train(config)
    assert train(dataclasses.replace(config, steps=6, allow_other=("data",))).steps == 6
