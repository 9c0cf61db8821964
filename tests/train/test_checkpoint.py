"""Checkpoints appear whole or not at all, say when they are damaged, and hold no code."""

import os
import zipfile

import pytest
import torch

from mlip_kernels.testing import assert_identical
from mlip_kernels.train import checkpoint


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    state = {"step": 3, "weights": torch.randn(4), "nested": {"rate": 0.5, "names": ["a"]}}
    path = checkpoint.save(tmp_path, 3, state, keep=2)
    for loaded in (checkpoint.load(path), torch.load(path), torch.load(path, mmap=True)):
        assert_identical(loaded.pop("weights"), state["weights"])
        assert loaded == {name: value for name, value in state.items() if name != "weights"}
    assert zipfile.ZipFile(path).testzip() is None


def test_only_the_newest_are_kept_oldest_first(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, {"step": step}, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002.pt", "step-00000010.pt"]


def test_a_failed_write_leaves_the_previous_checkpoint_and_no_litter(tmp_path):
    checkpoint.save(tmp_path, 1, {"step": 1}, keep=1)
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        checkpoint.save(tmp_path, 2, {"cannot be pickled": lambda: None}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".writing-step-00000001.pt").write_bytes(b"half")
    checkpoint.save(tmp_path, 2, {"step": 2}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002.pt"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_permissions_are_those_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        path = checkpoint.save(tmp_path, 1, {"step": 1}, keep=1)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_it_is_on_disk_before_it_has_its_name_and_the_name_before_older_ones_go(tmp_path, monkeypatch):
    """What a loss of power leaves: the calls that wait for the disk, in their order."""
    checkpoint.save(tmp_path, 1, {"step": 1}, keep=1)
    calls = []

    def record(name):
        call = getattr(os, name)

        def recording(*arguments, **options):
            target = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else arguments[0]
            calls.append((name, os.path.basename(target)))
            return call(*arguments, **options)

        monkeypatch.setattr(os, name, recording)

    for name in ("fsync", "replace", "unlink"):
        record(name)
    checkpoint.save(tmp_path, 2, {"step": 2}, keep=1)
    assert calls == [
        ("fsync", ".writing-step-00000002.pt"),
        ("replace", ".writing-step-00000002.pt"),
        ("fsync", tmp_path.name),
        ("unlink", "step-00000001.pt"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no checksum at its end"),
        (b"hello world\n" * 9, "no checksum at its end"),
        ("folder", "Is a directory"),
        ({}, "no checksum at its end"),  # of torch.save itself
    ],
    ids=["empty", "text", "folder", "foreign"],
)
def test_an_odd_file_is_named(tmp_path, content, message):
    path = tmp_path / "step-00000001.pt"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises((ValueError, OSError), match=message) as failure:
        checkpoint.load(path)
    assert path.name in str(failure.value)
    assert "weights_only" not in str(failure.value)


@pytest.mark.parametrize("state", [{"model": torch.nn.Linear(1, 1)}, [1]], ids=["code", "list"])
def test_a_whole_file_of_something_else_is_refused_without_advice_to_run_it(tmp_path, state):
    path = checkpoint.save(tmp_path, 1, state, keep=1)
    with pytest.raises(ValueError, match="not a checkpoint of this trainer") as failure:
        checkpoint.load(path)
    assert path.name in str(failure.value)
    assert "\n" not in str(failure.value)
    assert "weights_only" not in str(failure.value)


def test_newer_checkpoints_step_aside(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step}, keep=3)
    aside = checkpoint.set_aside(tmp_path, after=1)
    assert [path.name for path in aside] == ["step-00000002.pt.aside", "step-00000003.pt.aside"]
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000001.pt"]
