"""Every field of the configuration is checked when it is made."""

from __future__ import annotations

import re

import pytest

import mlip_kernels.data.packages
from mlip_kernels.data import DataConfig, open_data


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("data", "photos.zip", ValueError),
        ("data", 3, TypeError),
        ("held_out", "photos", ValueError),
        ("held_out", "openmoji", ValueError),
        ("held_out_pairs", 0, ValueError),
        ("held_out_pairs", 2.0, TypeError),
        ("image_size", 4, ValueError),
        ("image_size", "64", TypeError),
        ("context_length", 2, ValueError),
        ("batch_size", 0, ValueError),
        ("batch_size", True, TypeError),
        ("workers", -1, ValueError),
        ("seed", -1, ValueError),
        ("seed", None, TypeError),
        ("csv_separator", "", ValueError),
        ("csv_separator", "\\t", ValueError),
        ("csv_separator", 9, TypeError),
        ("csv_image_key", "", ValueError),
        ("csv_caption_key", None, TypeError),
        ("csv_caption_key", "filepath", ValueError),
        ("samples_per_epoch", 0, ValueError),
        ("on_damage", "ignore", ValueError),
        ("cache_dir", 1, TypeError),
    ],
)
def test_a_wrong_field_is_named_with_what_came(field, value, error):
    shown = type(value).__name__ if error is TypeError else re.escape(repr(value))
    with pytest.raises(error, match=f"^{field}: expected .*got {shown}"):
        DataConfig(**{field: value})


def test_shards_need_a_length_and_held_out_pairs():
    with pytest.raises(ValueError, match="samples_per_epoch: "):
        DataConfig(data="a.tar", held_out="b.tar")
    with pytest.raises(ValueError, match=r"held_out: .*cannot be split"):
        DataConfig(data="a.tar", samples_per_epoch=10)


def test_the_trainer_passes_on_what_becomes_of_damage():
    pytest.importorskip("open_clip", reason="needs the [train] extra")
    from mlip_kernels.train.config import TrainConfig

    shards = {"data": "a.tar", "held_out": "b.tar", "samples_per_epoch": 128}
    assert TrainConfig(**shards).data_config().on_damage == "auto"
    assert TrainConfig(**shards, on_damage="skip").data_config().on_damage == "skip"


def test_an_absent_package_is_named_with_the_remedy(monkeypatch):
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(mlip_kernels.data.packages.importlib, "import_module", absent)
    with pytest.raises(ImportError, match=re.escape("pip install 'mlip_kernels[train]'")):
        open_data(DataConfig())
