"""Checkpoints appear whole or not at all, and hold no code."""

import pytest
import torch

from mlip_kernels.train import checkpoint


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    state = {"step": 3, "weights": torch.randn(4), "nested": {"rate": 0.5, "names": ["a"]}}
    loaded = checkpoint.load(checkpoint.save(tmp_path, 3, state, keep=2))
    assert torch.equal(loaded.pop("weights"), state.pop("weights"))
    assert loaded == state


def test_only_the_newest_are_kept_oldest_first(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, {"step": step}, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002.pt", "step-00000010.pt"]


def test_a_failed_write_leaves_the_previous_checkpoint_and_no_litter(tmp_path):
    checkpoint.save(tmp_path, 1, {"step": 1}, keep=1)
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        checkpoint.save(tmp_path, 2, {"cannot be pickled": lambda: None}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_a_damaged_file_is_named(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"weights": torch.randn(100)}, keep=1)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=path.name):
        checkpoint.load(path)


def test_code_in_a_file_is_refused(tmp_path):
    path = tmp_path / "step-00000001.pt"
    torch.save({"model": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(ValueError, match=path.name):
        checkpoint.load(path)
