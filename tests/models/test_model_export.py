"""What `mlip-export` writes, other libraries load: the same features from the same picture, merging included."""

import copy
import dataclasses
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from mlip_kernels.export import main
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
from mlip_kernels.models.export import export
from mlip_kernels.testing import assert_as_accurate, assert_identical
from mlip_kernels.train import TrainConfig, checkpoint

TINY = MLIPConfig(
    image=ImageConfig(image_size=48, patch_size=8, width=32, depth=4, heads=2),
    text=TextConfig(context_length=9, width=32, depth=2, heads=2),
    merging=MergingConfig(keep_rate=0.6, guide="spatial"),
    loss=LossConfig(token_dim=16),
    embed_dim=16,
)
CLIP_LIKE = dataclasses.replace(TINY.image, pre_norm=True, norm_epsilon=1e-5, activation="quick_gelu")
MODELS = {
    "today's": TINY,
    "mean of patches": dataclasses.replace(TINY, image=dataclasses.replace(TINY.image, pool="avg")),
    "OpenAI's": dataclasses.replace(
        TINY, image=CLIP_LIKE, text=dataclasses.replace(TINY.text, activation="quick_gelu")
    ),
    "energy, fewer at evaluation": dataclasses.replace(
        TINY,
        merging=MergingConfig(
            keep_rate=0.9,
            test_keep_rate=0.55,
            layers=(1, 2),
            guide="both",
            frequency_guide="energy",
            guide_weight=0.5,
            proportional_attention=False,
        ),
    ),
    "no merging": TINY.clip(),
}


def perturbed(config: MLIPConfig) -> MLIP:
    torch.manual_seed(0)
    model = MLIP(config, Preprocessing(config.image.image_size, mean=(0.5, 0.4, 0.3)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model.eval()


def picture() -> Image.Image:
    values = torch.randint(256, (80, 110, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return Image.fromarray(values.numpy())


def run(line: str, **names: Any) -> Any:
    """The model that the printed ``line`` loads or patches, with nothing else imported."""
    exec(line, names)
    return names["model"]


@torch.no_grad()
def assert_same_image_feature(found: nn.Module, image: torch.Tensor, model: MLIP) -> None:
    truth = copy.deepcopy(model).double().encode_image(image.double())
    encode = getattr(found, "encode_image", found)
    assert_as_accurate(encode(image), model.encode_image(image), truth)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("to", ["open_clip", "timm"])
def test_the_printed_lines_give_the_features_of_the_model(tmp_path, capsys, config, to):
    model = perturbed(config)
    model.save_pretrained(tmp_path / "model")
    assert main(["--to", to, str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    load, *merge = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    found = run(load).eval()
    if to == "timm":
        preprocess = create_transform(**resolve_model_data_config(found))
    else:
        preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")[2]
    image = preprocess(picture())[None]
    assert_identical(image[0], model.preprocess(picture()))
    if config.merging.active:
        plain = found(image)[0] if to == "open_clip" else found(image)
        found = run(merge[0], model=found)
        merged = found(image)[0] if to == "open_clip" else found(image)
        assert not torch.allclose(plain, merged)
    assert bool(merge) == config.merging.active
    assert_same_image_feature(found, image, model)
    if to == "open_clip":
        text = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(["a cat", "two dogs"])
        assert_identical(text, model.tokenize(["a cat", "two dogs"]))
        assert_identical(found.encode_text(text), model.encode_text(text))
        assert_identical(found.logit_scale.detach(), model.logit_scale.detach())


def test_a_checkpoint_becomes_a_folder_bit_for_bit(tmp_path, capsys):
    model = perturbed(TINY)
    state = {"model": model.state_dict(), "config": TrainConfig(model=TINY).to_dict()}
    path = checkpoint.save(tmp_path, 7, state, keep=1)
    assert main(["--to", "safetensors", str(path), str(tmp_path / "model")]) == 0
    load = capsys.readouterr().out.splitlines()[1].strip()
    back = run(load)
    assert back.config == TINY
    for name, value in model.state_dict().items():
        assert_identical(back.state_dict()[name], value, name=name)


def test_what_serves_training_alone_is_said(tmp_path):
    done = export(perturbed(TINY), "open_clip", tmp_path / "out")
    assert "frequency_stage" in done.left
    assert not {"visual", "text", "logit_scale", "visual_projection"} & set(done.left)
    assert "text" in export(perturbed(TINY), "timm", tmp_path / "other").left


SIMILARITY = dataclasses.replace(TINY, merging=MergingConfig(keep_rate=0.6, guide="both"))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (SIMILARITY, [], r"MergingConfig.guide: 'both' asks the Frequency Stage"),
        (
            dataclasses.replace(TINY, merging=MergingConfig(granularity="three_way")),
            [],
            r"MergingConfig.granularity: a patched model merges by number",
        ),
        (
            dataclasses.replace(TINY, frequency=FrequencyConfig(fusion="residual")),
            ["--no-merging"],
            r"FrequencyConfig.fusion: expected 'none', got 'residual'",
        ),
    ],
    ids=["similarity", "three-way", "residual"],
)
@pytest.mark.parametrize("to", ["open_clip", "timm"])
def test_what_cannot_be_expressed_is_refused_and_writes_nothing(tmp_path, capsys, config, options, message, to):
    perturbed(config).save_pretrained(tmp_path / "model")
    assert main(["--to", to, *options, str(tmp_path / "model"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message.replace("\\", "") in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "merge"), [(["--guide", "both"], True), (["--no-merging"], False)])
def test_a_model_guided_by_its_frequency_stage_goes_another_way_when_asked(tmp_path, capsys, options, merge):
    perturbed(SIMILARITY).save_pretrained(tmp_path / "model")
    assert main(["--to", "open_clip", *options, str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert ("guide='both', energy_cutoff=0.25)" in said) == merge
    assert ("other tokens merge than in the model" in said) == merge


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": dataclasses.replace(TINY.image, norm_epsilon=1e-4)}, "ImageConfig.norm_epsilon: timm's"),
        ({"image": CLIP_LIKE}, None),
    ],
)
def test_timm_has_two_epsilons(tmp_path, change, message):
    model = perturbed(dataclasses.replace(TINY, **change))
    if message is None:
        assert export(model, "timm", tmp_path / "out").folder.is_dir()
        return
    with pytest.raises(ValueError, match=message):
        export(model, "timm", tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("nothing", "out", "nothing"),
        ("full", "out", "no config.json in it"),
        ("full/note.txt", "out", "not a whole checkpoint"),
        ("model", "full", "output: expected a new or empty folder"),
    ],
)
def test_wrong_paths_are_named(tmp_path, capsys, source, output, message):
    perturbed(TINY).save_pretrained(tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("a note")
    assert main(["--to", "open_clip", str(tmp_path / source), str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mlip-export: error: ")
    assert error.count("\n") == 1
    assert message in error
