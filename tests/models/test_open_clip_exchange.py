"""A model of open_clip as an MLIP and back: parameters to the bit, features to float32 rounding."""

import copy
import dataclasses
from typing import Any

import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP, convert_to_custom_text_state_dict
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

import mlip_kernels.patch.open_clip
from mlip_kernels.models import (
    MLIP,
    FrequencyConfig,
    ImageConfig,
    LossConfig,
    MergingConfig,
    MLIPConfig,
    TextConfig,
    from_open_clip,
    to_open_clip,
)
from mlip_kernels.models.open_clip_exchange import mlip_config, open_clip_config
from mlip_kernels.testing import assert_as_accurate, assert_identical

VISION: dict[str, Any] = {"image_size": 48, "patch_size": 8, "width": 32, "layers": 4, "head_width": 16}
TEXT: dict[str, Any] = {"context_length": 9, "width": 32, "layers": 2, "heads": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "LAION's": {},
    "OpenAI's": {"quick_gelu": True},
    "mean of patches": {"vision_cfg": {"pool_type": "avg"}},
    "no norm in front": {"vision_cfg": {"no_ln_pre": True, "norm_kwargs": {"eps": 1e-6}, "mlp_ratio": 3.0}},
}
TOWERS = MLIPConfig(
    image=ImageConfig(image_size=48, patch_size=8, width=32, depth=4, heads=2),
    text=TextConfig(context_length=9, width=32, depth=2, heads=2),
    loss=LossConfig(token_dim=16),
    embed_dim=16,
)


def perturbed(model: nn.Module) -> nn.Module:
    """With every parameter moved, so that none is 0 or 1, as biases and norms begin."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def clip(kind: type[nn.Module] = CLIP, **changed: Any) -> nn.Module:
    torch.manual_seed(0)
    vision, text = ({**plain, **changed.pop(name, {})} for name, plain in (("vision_cfg", VISION), ("text_cfg", TEXT)))
    return perturbed(kind(embed_dim=16, vision_cfg=vision, text_cfg=text, **changed))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 400, (3, 9), generator=generator)
    text[:, 0], text[:, 6], text[:, 7:] = 49406, 49407, 0
    return torch.randn(3, 3, 48, 48, generator=generator), text


@torch.no_grad()
def assert_same_features(found: nn.Module, expected: nn.Module) -> None:
    images, text = batch()
    precise = copy.deepcopy(expected).double()
    image_truth, text_truth = precise.encode_image(images.double()), precise.encode_text(text)
    assert_as_accurate(found.encode_image(images), expected.encode_image(images), image_truth, name="image")
    assert_as_accurate(found.encode_text(text), expected.encode_text(text), text_truth, name="text")


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    one, other = (convert_to_custom_text_state_dict(model.state_dict()) for model in (found, expected))
    assert one.keys() == other.keys()
    for name, value in other.items():
        assert_identical(one[name], value, name=name)


@pytest.mark.parametrize("changed", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
def test_open_clip_and_back(changed, kind):
    model = clip(kind, **changed)
    mlip = from_open_clip(model)
    assert_same_features(mlip, model)
    back = to_open_clip(mlip)
    assert_same_features(back, model)
    assert_same_state(back, model)


def built_in(name: str) -> dict[str, Any]:
    config = open_clip.get_model_config(name)
    return {"quick_gelu": False, **{part: config[part] for part in config if part != "preprocess_cfg"}}


def test_a_vit_b_32_of_openai_with_fewer_blocks_and_back():
    config = built_in("ViT-B-32-quickgelu")
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 2
    torch.manual_seed(0)
    model = CLIP(**config).eval()
    mlip = from_open_clip(model)
    assert mlip.config.image == ImageConfig(
        patch_size=32, depth=2, pre_norm=True, norm_epsilon=1e-5, activation="quick_gelu"
    )
    assert mlip.config.text == TextConfig(depth=2, activation="quick_gelu")
    assert_same_state(to_open_clip(mlip), model)
    images, text = torch.randn(1, 3, 224, 224), torch.arange(77)[None]
    with torch.no_grad():
        truth = copy.deepcopy(model.visual).double()(images.double())
        assert_as_accurate(mlip.encode_image(images), model.encode_image(images), truth)
        assert_identical(mlip.encode_text(text), model.encode_text(text))


@pytest.mark.parametrize(
    "name",
    ["ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14", "ViT-L-14-336-quickgelu", "ViT-H-14", "ViT-g-14", "ViT-bigG-14"],
)
def test_a_built_in_layout_is_that_of_the_configuration(name):
    with torch.device("meta"):
        model = CLIP(**built_in(name))
        back = CLIP(**open_clip_config(mlip_config(model)))
    assert repr(back) == repr(model)
    assert {key: value.shape for key, value in back.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_the_image_tower_is_what_timm_makes_of_it():
    model = clip(quick_gelu=True)
    trunk = from_open_clip(model).visual.trunk
    for name, value in checkpoint_filter_fn(model.state_dict(), trunk).items():
        if not name.startswith("head."):
            assert_identical(trunk.state_dict()[name], value, name=name)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_an_mlip_of_today_and_back(pool):
    """Its bias of patches goes into the positions, so that features and not parameters are those of before."""
    torch.manual_seed(0)
    config = dataclasses.replace(TOWERS, image=dataclasses.replace(TOWERS.image, pool=pool)).clip()
    mlip = perturbed(MLIP(config))
    model = to_open_clip(mlip)
    assert_same_features(model, mlip)
    assert_same_features(from_open_clip(model), mlip)


def test_a_timm_tower_of_open_clip():
    text, vision = {"context_length": 9}, {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token"}
    torch.manual_seed(0)
    model = perturbed(CustomTextCLIP(16, vision, {**TEXT, **text}))
    mlip = from_open_clip(model)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        truth = copy.deepcopy(model).double().encode_image(images.double())
        assert_as_accurate(mlip.encode_image(images), model.encode_image(images), truth)


MERGING = {
    "no guide": {"guide": "none"},
    "spatial": {"guide": "spatial", "guide_weight": 2.0},
    "energy": {"guide": "frequency", "frequency_guide": "energy"},
    "both": {"guide": "both", "frequency_guide": "energy", "layers": (1, 2)},
    "overall": {"guide": "none", "overall": True, "keep_rate": 0.4, "proportional_attention": False},
}


@pytest.mark.parametrize("changed", MERGING.values(), ids=MERGING.keys())
def test_the_patch_brings_merging_back(changed):
    from mlip_kernels.models.export import merging_arguments

    config = dataclasses.replace(MLIPConfig().clip(), merging=MergingConfig(**{"keep_rate": 0.6, **changed}))
    mlip = from_open_clip(clip(), like=config)
    merged = mlip_kernels.patch.open_clip.apply(to_open_clip(mlip), **merging_arguments(mlip.config))
    images = batch()[0]
    with torch.no_grad():
        truth = copy.deepcopy(mlip).double().encode_image(images.double())
        unmerged = to_open_clip(mlip).encode_image(images)
        assert_as_accurate(merged.encode_image(images), mlip.encode_image(images), truth)
        assert not torch.allclose(unmerged, truth.float(), rtol=1e-3)


def test_parts_that_only_training_needs_are_drawn_for_the_configuration_asked_for():
    model = clip()
    mlip = from_open_clip(model, like=dataclasses.replace(TOWERS, merging=MergingConfig(keep_rate=1.0)))
    assert mlip.frequency_stage is not None
    assert mlip.config.image.pre_norm
    assert_same_features(mlip, model)
    assert "frequency_stage" not in " ".join(to_open_clip(mlip).state_dict())


def test_preprocessing_travels():
    model = clip()
    model.visual.preprocess_cfg = {"size": (48, 48), "mode": "RGB", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    mlip = from_open_clip(model)
    assert (mlip.preprocessing.mean, mlip.preprocessing.size) == ((0.5, 0.5, 0.5), 48)
    assert to_open_clip(mlip).visual.preprocess_cfg["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "model: expected open_clip's CLIP or CustomTextCLIP, got Linear"),
        (
            lambda: CoCa(16, {"width": 16, "layers": 1, "heads": 2, "mlp_ratio": 1}, TEXT, VISION),
            TypeError,
            "got CoCa",
        ),
        (lambda: clip(init_logit_bias=-10.0), ValueError, r"model.logit_bias: an MLIP has none"),
        (lambda: clip(vision_cfg={"attentional_pool": True}), ValueError, r"model.visual.attn_pool"),
        (lambda: clip(vision_cfg={"pool_type": "none"}), ValueError, r"model.visual.pool_type: expected 'tok'"),
        (lambda: clip(vision_cfg={"patch_dropout": 0.5}), ValueError, r"force_patch_dropout=0.0"),
        (lambda: clip(vision_cfg={"image_size": (48, 32)}), ValueError, r"model.visual.image_size: expected a square"),
        (lambda: clip(vision_cfg={"ls_init_value": 0.1}), ValueError, r"an MLIP has no \(ls_1\): LayerScale"),
        (lambda: clip(vision_cfg={"qk_norm": True}), TypeError, r"resblocks\[0\].attn: expected MultiheadAttention"),
        (lambda: clip(vision_cfg={"layers": (1, 1, 1, 1), "head_width": 64}), TypeError, r"got ModifiedResNet"),
        (lambda: clip(text_cfg={"vocab_size": 32000}), ValueError, r"vocab_size: expected the 49408 entries"),
        (lambda: clip(CustomTextCLIP, text_cfg={"no_causal_mask": True}), ValueError, r"no causal mask"),
        (lambda: clip(text_cfg={"norm_kwargs": {"eps": 1e-3}}), ValueError, r"model.text.transformer: .*eps=0.001"),
        (lambda: clip(text_cfg={"mlp_ratio": 2.0}), ValueError, r"model.text: expected an mlp_ratio of 4.0, got 2.0"),
        (lambda: clip().bfloat16(), ValueError, r"expected float32 parameters, got torch.bfloat16"),
        (
            lambda: mlip_kernels.patch.open_clip.apply(clip(), 1),
            TypeError,
            r"mlip_kernels.patch.open_clip.remove takes a patch off",
        ),
    ],
)
def test_what_an_mlip_cannot_express_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        from_open_clip(make())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frequency": FrequencyConfig(order="sequential")}, r"FrequencyConfig.order: expected 'parallel'"),
        ({"frequency": FrequencyConfig(fusion="residual")}, r"FrequencyConfig.fusion: expected 'none'"),
        (
            {"image": dataclasses.replace(TOWERS.image, activation="quick_gelu")},
            r"ImageConfig.activation: open_clip has one activation",
        ),
    ],
)
def test_what_open_clip_cannot_express_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        to_open_clip(MLIP(dataclasses.replace(TOWERS, **changed)))
