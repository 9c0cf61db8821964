"""Zero-shot classification of class folders: whose names, and what counts as right."""

import json
import shutil

import pytest
import torch
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image
from tiny_run import MODEL

from mlip_kernels.models import MLIP
from mlip_kernels.train.zeroshot import ClassFolders, classify

COLOURS = {"light_blue": (150, 180, 255), "red": (255, 0, 0), "green": (0, 200, 0)}


@pytest.fixture
def folder(tmp_path):
    for name, colour in COLOURS.items():
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (20 + number, 30), colour).save(tmp_path / name / f"{number}.png")
    return tmp_path


def classified(model, folder):
    autocast = torch.autocast("cpu", enabled=False)
    return classify(model, ClassFolders(folder), torch.device("cpu"), autocast, batch_size=4, workers=0)


class Oracle(MLIP):
    """Sees red, green and blue, and reads them in captions."""

    def encode_image(self, images, *, normalize=False):
        return torch.nn.functional.normalize(images.mean((2, 3)) - images.mean((1, 2, 3))[:, None], dim=1)

    def encode_text(self, text, *, normalize=False):
        words = [self.tokenize(name)[0, 1] for name in ("red", "green", "blue")]
        return torch.stack([(text == word).any(1) for word in words], dim=1).float()


def test_a_model_that_knows_the_classes_is_right(folder):
    model = Oracle(MODEL).train()
    assert classified(model, folder) == {"zeroshot_top1": 1.0, "zeroshot_top5": 1.0}
    assert model.training


def test_equal_features_are_wrong(folder, monkeypatch):
    monkeypatch.setattr(Oracle, "encode_image", lambda self, images, *, normalize: torch.ones(len(images), 3))
    assert classified(Oracle(MODEL), folder)["zeroshot_top1"] == 0.0


def test_names_are_those_of_the_folders(folder):
    assert ClassFolders(folder).names == ["green", "light blue", "red"]


def test_a_file_renames_them(folder):
    names = {"green": "grass", "red": "fire", "light_blue": "sky"}
    (folder / "classnames.json").write_text(json.dumps(names))
    assert ClassFolders(folder).names == ["grass", "sky", "fire"]


def test_the_synsets_of_imagenet_are_known(tmp_path):
    for number in range(1000):
        (tmp_path / f"n{number:08}").mkdir()
        Image.new("RGB", (2, 2)).save(tmp_path / f"n{number:08}" / "0.png")
    assert ClassFolders(tmp_path).names == list(IMAGENET_CLASSNAMES)
    shutil.rmtree(tmp_path / "n00000999")
    with pytest.raises(ValueError, match=r"expected the 1,000 synsets of ImageNet, got 999 .*classnames\.json"):
        ClassFolders(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"green": "grass"}'])
def test_a_wrong_file_of_names_is_named(folder, content):
    (folder / "classnames.json").write_text(content)
    with pytest.raises(ValueError, match=r"classnames\.json: expected an object with a name for each folder"):
        ClassFolders(folder)


def test_a_missing_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ClassFolders(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"zeroshot: .*empty"):
        ClassFolders(tmp_path)
