"""A run starts from the weights of others, and leaves the towers alone that are locked."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from tiny_run import MODEL
from torch import Tensor

from mlip_kernels.models import MLIP, ImageConfig, Preprocessing, to_open_clip
from mlip_kernels.models.export import export
from mlip_kernels.models.open_clip_exchange import open_clip_config
from mlip_kernels.testing import assert_as_accurate, assert_identical
from mlip_kernels.train import checkpoint, train
from mlip_kernels.train.__main__ import parse
from mlip_kernels.train.pretrained import start_from

CLIP_LIKE = dataclasses.replace(
    MODEL, image=dataclasses.replace(MODEL.image, pre_norm=True, norm_epsilon=1e-5), merging=MODEL.clip().merging
)


def drawn(config=CLIP_LIKE, seed: int = 0, **pictures: Any) -> MLIP:
    torch.manual_seed(seed)
    model = MLIP(config, Preprocessing(config.image.image_size, **pictures)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model


def assert_same_towers(model: MLIP, expected: MLIP, *, text: bool = True) -> None:
    for name, value in expected.state_dict().items():
        if name.startswith(("visual.", "text.") if text else "visual."):
            assert_identical(model.state_dict()[name], value, name=name)


def folder_of_ours(model: MLIP, folder: Path) -> str:
    return str(model.save_pretrained(folder / "ours"))


def checkpoint_of_ours(model: MLIP, folder: Path) -> str:
    state = {"model": model.state_dict(), "config": {"model": model.config.to_dict()}}
    return str(checkpoint.save(folder, 3, state, keep=1))


def folder_of_open_clip(model: MLIP, folder: Path) -> str:
    return str(export(model, "open_clip", folder / "open_clip").folder)


def file_of_open_clip(model: MLIP, folder: Path) -> str:
    save_file(to_open_clip(model).state_dict(), folder / "weights.safetensors")
    return str(folder / "weights.safetensors")


def name_and_file_of_open_clip(model: MLIP, folder: Path) -> str:
    (folder / "tiny-of-a-test.json").write_text(json.dumps(open_clip_config(model.config)))
    open_clip.add_model_config(folder / "tiny-of-a-test.json")
    torch.save(to_open_clip(model).state_dict(), folder / "weights.pt")
    return f"tiny-of-a-test:{folder / 'weights.pt'}"


BOTH = [
    folder_of_ours,
    checkpoint_of_ours,
    folder_of_open_clip,
    file_of_open_clip,
    name_and_file_of_open_clip,
]


@pytest.mark.parametrize("write", BOTH)
def test_both_towers_are_taken(tmp_path, write):
    source = drawn()
    model = drawn(seed=1)
    said = start_from(write(source, tmp_path), model)
    assert_same_towers(model, source)
    assert_identical(model.visual_projection.weight.detach(), source.visual_projection.weight.detach())
    assert ("drawn at random: " in said) == (write not in (folder_of_ours, checkpoint_of_ours))


def test_a_tower_of_timm_is_taken(tmp_path):
    source, model = drawn(), drawn(seed=1)
    text = copy.deepcopy(model.text)
    said = start_from(str(export(source, "timm", tmp_path / "timm").folder), model)
    assert_same_towers(model, source, text=False)
    for name, value in text.state_dict().items():
        assert_identical(model.text.state_dict()[name], value, name=name)
    assert {"text", "visual_projection"} <= set(said.partition("drawn at random: ")[2].split(", "))


def test_timm_and_back(tmp_path):
    """The state of a model that timm saved, but for its head."""
    image = CLIP_LIKE.image
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": image.width, "depth": image.depth, "num_heads": image.heads}
    torch.manual_seed(0)
    trunk = timm.create_model("vit_base_patch32_clip_224", num_classes=3, **sizes)
    save_for_hf(trunk, tmp_path / "timm", model_args=sizes, safe_serialization=True)
    model = drawn()
    start_from(str(tmp_path / "timm"), model)
    folder = export(model, "timm", tmp_path / "back").folder
    back = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    assert back.keys() == trunk.state_dict().keys()
    for name, value in trunk.state_dict().items():
        if not name.startswith("head."):
            assert_identical(back[name], value, name=name)


def test_a_timm_name_with_a_file(tmp_path):
    """Also where timm's pictures have another mean than ours, as those of most of its models do."""
    torch.manual_seed(0)
    trunk = timm.create_model("test_vit").eval()
    torch.save(trunk.state_dict(), tmp_path / "weights.pt")
    trunk.reset_classifier(0)
    sizes = {"image_size": 160, "patch_size": 16, "width": 64, "depth": 6, "heads": 2, "mlp_ratio": 3.0}
    model = MLIP(dataclasses.replace(CLIP_LIKE, image=ImageConfig(**sizes))).eval()
    start_from(f"timm/test_vit:{tmp_path / 'weights.pt'}", model)
    colours = torch.rand(2, 3, 160, 160, dtype=torch.float64)
    theirs = normalized(colours, trunk.pretrained_cfg["mean"], trunk.pretrained_cfg["std"])
    ours = normalized(colours, model.preprocessing.mean, model.preprocessing.std)
    assert not torch.allclose(theirs, ours)
    with torch.no_grad():
        truth = copy.deepcopy(trunk).double()(theirs)
        found = model.encode_image_tokens(ours.float(), supervised=False)[0].feature
        assert_as_accurate(found, trunk(theirs.float()), truth, factor=4.0)


def normalized(colours: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    centre, deviation = (torch.tensor(values, dtype=colours.dtype)[:, None, None] for values in (mean, std))
    return (colours - centre) / deviation


@pytest.mark.parametrize(
    "config", [CLIP_LIKE, dataclasses.replace(MODEL, merging=CLIP_LIKE.merging)], ids=["CLIP", "timm"]
)
def test_other_means_go_into_the_weights(tmp_path, config):
    source = drawn(config, mean=(0.5, 0.4, 0.6), std=(0.2, 0.3, 0.5))
    model = drawn(config, seed=1)
    start_from(folder_of_ours(source, tmp_path), model)
    colours = torch.rand(2, 3, 32, 32, dtype=torch.float64)

    theirs, ours = (normalized(colours, each.preprocessing.mean, each.preprocessing.std) for each in (source, model))
    with torch.no_grad():
        truth = copy.deepcopy(source).double().encode_image(theirs)
        baseline = source.encode_image(theirs.float())
        assert_as_accurate(model.encode_image(ours.float()), baseline, truth, factor=4.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing-like-it", r"pretrained: expected a folder that .*, got 'nothing-like-it'"),
        (
            "ViT-B-32:nothing",
            r"pretrained: ViT-B-32:nothing: expected ViT-B-32:FILE or ViT-B-32:TAG \(openai, laion400m",
        ),
        ("{folder}", r"pretrained: expected a folder that .*, got the folder .*, which holds none"),
    ],
)
def test_what_is_nothing_to_start_from_is_named(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        start_from(name.format(folder=tmp_path), drawn())


def test_other_towers_are_refused_with_the_options_that_fit(tmp_path):
    other = dataclasses.replace(
        CLIP_LIKE,
        image=dataclasses.replace(CLIP_LIKE.image, pre_norm=False, activation="quick_gelu"),
        text=dataclasses.replace(CLIP_LIKE.text, depth=2),
    )
    name = folder_of_ours(drawn(other), tmp_path)
    message = "it would fit with --model.image.no-pre-norm --model.image.activation quick_gelu --model.text.depth 2"
    with pytest.raises(ValueError, match=message):
        start_from(name, drawn())
    options = message.partition("--")[1:]
    parsed = parse(["--preset", "finetune-vit-b-32", *"".join(options).split()])
    assert (parsed.model.image.pre_norm, parsed.model.image.activation) == (False, "quick_gelu")


def test_weights_of_another_shape_are_refused(tmp_path):
    name = file_of_open_clip(drawn(), tmp_path)
    wide = dataclasses.replace(CLIP_LIKE, image=dataclasses.replace(CLIP_LIKE.image, width=48))
    with pytest.raises(ValueError, match=r"does not fit the model: visual.trunk.cls_token of shape \[1, 1, 32\] for"):
        start_from(name, drawn(wide))


LOCKS = {
    "image": ({"lock_image": True}, ("visual.", "visual_projection")),
    "image but its projection": ({"lock_image": True, "lock_image_unlocked_groups": 1}, ("visual.",)),
    "image but its last block": (
        {"lock_image": True, "lock_image_unlocked_groups": 2},
        tuple(
            f"visual.trunk.{part}" for part in ("patch", "cls", "pos", "norm_pre", "blocks.0", "blocks.1", "blocks.2")
        ),
    ),
    "text": ({"lock_text": True}, ("text.",)),
    "both, some of it trained": (
        {"lock_image": True, "lock_text": True, "lock_text_unlocked_layers": 1, "accumulate": 2},
        ("visual.", "visual_projection", "text.transformer", "text.ln", "text.token", "text.pos"),
    ),
}


@pytest.mark.parametrize(("options", "locked"), LOCKS.values(), ids=LOCKS.keys())
def test_a_run_starts_from_weights_and_leaves_locked_ones_alone(tiny, tmp_path, options, locked):
    source = drawn(MODEL)
    name = folder_of_ours(source, tmp_path)
    config = dataclasses.replace(tiny, pretrained=name, steps=2, precision="float32", **options)
    model = train(config).model
    for key, value in source.state_dict().items():
        same = torch.equal(model.state_dict()[key], value)
        assert same == key.startswith(locked), key


def test_a_resumed_run_needs_no_weights_to_start_from(tiny, tmp_path):
    name = folder_of_ours(drawn(MODEL), tmp_path)
    config = dataclasses.replace(tiny, pretrained=name, steps=2)
    train(config)
    shutil.rmtree(name)
    assert train(dataclasses.replace(config, steps=3, resume=True)).steps == 3


def test_a_run_ends_with_a_folder_for_from_pretrained(tiny):
    model = train(dataclasses.replace(tiny, steps=1)).model
    back = MLIP.from_pretrained(Path(tiny.output) / "model")
    for name, value in model.state_dict().items():
        assert_identical(back.state_dict()[name], value, name=name)


def test_unlocked_groups_of_an_unlocked_tower_are_refused(tiny):
    with pytest.raises(ValueError, match=r"lock_image_unlocked_groups: expected 0 without lock_image"):
        dataclasses.replace(tiny, lock_image_unlocked_groups=1)
