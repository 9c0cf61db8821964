"""Without its own terms and without merging, an MLIP model is CLIP: parameters, features, loss, gradients."""

import copy
import dataclasses

import pytest
import torch
from open_clip.loss import ClipLoss
from torch.nn import functional as F

from mlip_kernels.models import MLIP, ImageConfig, LossConfig, MergingConfig, MLIPConfig, MLIPLoss, TextConfig
from mlip_kernels.testing import assert_as_accurate

TINY = MLIPConfig(
    image=ImageConfig(image_size=32, patch_size=8, width=32, depth=3, heads=2),
    text=TextConfig(context_length=9, width=32, depth=2, heads=2),
    loss=LossConfig(token_dim=16),
    embed_dim=16,
)


def batch(pairs: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(pairs, 3, 32, 32, generator=generator)
    text = torch.randint(1, 400, (pairs, 9), generator=generator)
    text[:, 0], text[:, 6], text[:, 7:] = 49406, 49407, 0
    return images, text


def clip_loss(model: MLIP, images: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """CLIP's loss, from timm's and open_clip's own forward functions on the parameters of ``model``."""
    image_features = F.normalize(model.visual_projection(model.visual.trunk(images)), dim=-1)
    text_features = F.normalize(model.text(text)[0], dim=-1)
    return ClipLoss()(image_features, text_features, model.logit_scale.exp())


@pytest.mark.parametrize(
    "config",
    [
        TINY.clip(),
        dataclasses.replace(
            TINY,
            loss=dataclasses.replace(TINY.loss, frequency_weight=0.0, token_weight=0.0),
            merging=MergingConfig(keep_rate=1.0),
        ),
    ],
    ids=["clip()", "weights and keep rate"],
)
def test_equals_clip(config):
    torch.manual_seed(0)
    model = MLIP(config)
    images, text = batch()
    expected = clip_loss(model, images, text)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    precise = copy.deepcopy(model).double()
    exact = clip_loss(precise, images.double(), text)
    truths = torch.autograd.grad(exact, list(precise.parameters()))
    loss = MLIPLoss(config.loss)(model(images, text))["loss"]
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert_as_accurate(loss, expected, exact, name="loss")
    names = [name for name, _ in model.named_parameters()]
    for name, gradient, wanted, truth in zip(names, gradients, expected_gradients, truths, strict=True):
        assert_as_accurate(gradient, wanted, truth, name=name)


def test_holds_no_parameter_beyond_clip():
    names = {name.split(".")[0] for name, _ in MLIP(TINY.clip()).named_parameters()}
    assert names == {"visual", "visual_projection", "text", "logit_scale"}


def test_the_full_model_differs_from_clip():
    torch.manual_seed(0)
    model = MLIP(TINY)
    images, text = batch()
    terms = MLIPLoss(TINY.loss)(model(images, text))
    assert set(terms) == {"global_spatial", "global_frequency", "token_spatial", "token_frequency", "loss"}
    assert not torch.equal(terms["loss"], clip_loss(model, images, text))
