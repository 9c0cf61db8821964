"""A model as a folder: bit for bit there and back, and from the folder to a similarity with nothing else at hand."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlip_kernels.data.batch import normalize
from mlip_kernels.data.images import central_view, load
from mlip_kernels.models import (
    MLIP,
    FrequencyConfig,
    ImageConfig,
    LossConfig,
    MergingConfig,
    MLIPConfig,
    Preprocessing,
    TextConfig,
)
from mlip_kernels.testing import assert_close, assert_identical

TINY = MLIPConfig(
    image=ImageConfig(image_size=32, patch_size=8, width=32, depth=3, heads=2),
    text=TextConfig(context_length=9, width=32, depth=2, heads=2),
    merging=MergingConfig(keep_rate=0.6, layers=(0, 2), warmup_steps=5),
    loss=LossConfig(token_dim=16),
    embed_dim=16,
)
CONFIGS = {
    "MLIP": TINY,
    "CLIP": TINY.clip(),
    "every part": dataclasses.replace(
        TINY,
        image=dataclasses.replace(TINY.image, pre_norm=True, norm_epsilon=1e-5, activation="quick_gelu"),
        frequency=FrequencyConfig(mixer="filter_bank", filters=2, text_transform="rfft", order="sequential"),
    ),
}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    values = torch.randint(256, (50, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(values.numpy())


def outputs(model: MLIP) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    images, text = torch.randn(3, 3, 32, 32, generator=generator), model.tokenize(["a cat", "two dogs", "tea"])
    features = model(images, text)
    found = [model.encode_image(images), model.encode_text(text)]
    for pair in (*features.pairs.values(), *features.token_pairs.values()):
        found += [pair.image, pair.text, pair.scale]
    return [value.detach() for value in found]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_model_comes_back_bit_for_bit(tmp_path, config):
    torch.manual_seed(0)
    model = MLIP(config, Preprocessing(32, mean=(0.5, 0.4, 0.3), resize_mode="squash")).eval()
    back = MLIP.from_pretrained(model.save_pretrained(tmp_path / "new" / "folder"))
    assert (back.config, back.preprocessing, back.training) == (model.config, model.preprocessing, False)
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert_identical(back.state_dict()[name], value, name=name)
    for found, expected in zip(outputs(back), outputs(model), strict=True):
        assert_identical(found, expected)
    assert all(parameter.requires_grad for parameter in back.parameters())


def test_three_lines_give_a_similarity(tmp_path, picture):
    MLIP(TINY).save_pretrained(tmp_path)

    model = MLIP.from_pretrained(tmp_path)
    image, text = model.preprocess(picture)[None], model.tokenize(["a cat", "a dog"])
    similarity = model.encode_image(image, normalize=True) @ model.encode_text(text, normalize=True).T

    assert similarity.shape == (1, 2)
    assert bool((similarity.abs() <= 1 + 1e-6).all())


def test_a_folder_without_the_fields_of_today_loads(tmp_path):
    """What a configuration leaves out is what a model had before there was a choice."""
    MLIP(TINY).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for name in ("pre_norm", "norm_epsilon", "activation"):
        del values["model"]["image"][name]
    del values["model"]["text"]["activation"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert MLIP.from_pretrained(tmp_path).config == TINY


def test_preprocessing_is_open_clip_s_and_the_trainer_s(tmp_path, picture):
    model = MLIP(TINY)
    assert_identical(model.preprocess(picture), image_transform(32, is_train=False)(picture))
    picture.save(tmp_path / "picture.png")
    trained = normalize(central_view(load((tmp_path / "picture.png").read_bytes(), 32), 32))
    assert_close(model.preprocess(Image.open(tmp_path / "picture.png")), trained)


def test_transparency_is_white_and_a_picture_is_upright_as_in_training(picture):
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    white = Image.new("RGB", (40, 40), "white")
    assert_identical(MLIP(TINY).preprocess(clear), MLIP(TINY).preprocess(white))
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    assert_identical(MLIP(TINY).preprocess(turned), MLIP(TINY).preprocess(picture))


def test_tokens_are_open_clip_s():
    captions = ["a photo of a cat", "x " * 40, ""]
    assert_identical(MLIP(TINY).tokenize(captions), SimpleTokenizer()(captions, 9))
    assert_identical(MLIP(TINY).tokenize("a cat"), MLIP(TINY).tokenize(["a cat"]))


def edited(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def reshaped(folder):
    state = load_file(folder / "model.safetensors")
    del state["logit_scale"]
    save_file(
        {**state, "visual_projection.weight": torch.zeros(2, 2), "more": torch.zeros(1)}, folder / "model.safetensors"
    )


FAULTS = {
    "no folder": (shutil.rmtree, FileNotFoundError, r"no such folder; expected a folder of MLIP.save_pretrained"),
    "no config": (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, r"no config.json in it"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        FileNotFoundError,
        r"model.safetensors: no such file",
    ),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), ValueError, r"config.json: not JSON"),
    "another's": (lambda folder: edited(folder, format="timm"), ValueError, r"not of MLIP.save_pretrained"),
    "a later version": (lambda folder: edited(folder, format_version=2), ValueError, r"format_version 1, got 2, .* 0"),
    "another tokenizer": (
        lambda folder: edited(folder, tokenizer={"kind": "wordpiece"}),
        ValueError,
        r"expected a tokenizer of kind 'clip_bpe', got {'kind': 'wordpiece'}",
    ),
    "an unknown field": (lambda folder: edited(folder, model={"widht": 3}), ValueError, r"unknown field widht"),
    "another size": (
        lambda folder: edited(folder, preprocessing={"size": 64}),
        ValueError,
        r"preprocessing: expected size=32, the image size of config, got 64",
    ),
    "damaged": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"damaged"),
        ValueError,
        r"model.safetensors: not a whole safetensors file",
    ),
    "another model": (
        reshaped,
        ValueError,
        r"no logit_scale, an unknown more, visual_projection.weight of shape \[2, 2\] for \[16, 32\]",
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_folder_that_does_not_hold_a_model_is_named(tmp_path, damage, error, message):
    folder = MLIP(TINY).save_pretrained(tmp_path / "model")
    damage(folder)
    with pytest.raises(error, match=re.escape(str(folder)) + ".*" + message):
        MLIP.from_pretrained(folder)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: MLIP(TINY, Preprocessing()), ValueError, "preprocessing: expected size=32"),
        (lambda: MLIP(TINY, {"size": 32}), TypeError, "preprocessing: expected Preprocessing or None, got dict"),
        (lambda: MLIP(TINY).preprocess("cat.png"), TypeError, "picture: expected PIL.Image.Image, got str"),
        (lambda: MLIP(TINY).tokenize(["a", 3]), TypeError, r"captions\[1\]: expected a string, got int"),
        (
            lambda: MLIP(dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, vocabulary=99))).tokenize("a"),
            ValueError,
            r"TextConfig.vocabulary: CLIP's tokenizer has 49408 entries, but the text tower only 99",
        ),
        (lambda: Preprocessing(std=(0, 1, 1)), ValueError, r"Preprocessing.std: expected a finite number >= 1e-06"),
        (lambda: Preprocessing.from_dict({"resize": "x"}), ValueError, r"Preprocessing: unknown field resize"),
        (lambda: Preprocessing.from_dict({"size": (3, 4)}), TypeError, r"Preprocessing.size: expected an integer"),
    ],
)
def test_wrong_use_is_named(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()
