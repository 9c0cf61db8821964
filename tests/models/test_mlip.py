"""The MLIP-style model under every switch of its configuration."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from mlip_kernels import use_reference
from mlip_kernels.models import MLIP, ImageConfig, LossConfig, MergingConfig, MLIPConfig, MLIPLoss, TextConfig
from mlip_kernels.nn.attention import attend
from mlip_kernels.testing import assert_close, assert_identical

TINY = MLIPConfig(
    image=ImageConfig(image_size=48, patch_size=8, width=32, depth=4, heads=2),
    text=TextConfig(context_length=9, width=32, depth=2, heads=2),
    merging=MergingConfig(keep_rate=0.6),
    loss=LossConfig(token_dim=16),
    embed_dim=16,
)
END = 49407


def changed(**sections: dict[str, Any]) -> MLIPConfig:
    """`TINY` with single fields of its sections replaced."""
    parts = {name: dataclasses.replace(getattr(TINY, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(TINY, **parts)


def batch(pairs: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(pairs, 3, 48, 48, generator=generator)
    text = torch.randint(1, 400, (pairs, 9), generator=generator)
    text[:, 0], text[:, 6], text[:, 7:] = 49406, END, 0
    return images, text


SWITCHES = {
    "defaults": {},
    "transform over tokens": {"frequency": {"transform": "tokens"}},
    "cosine basis": {"frequency": {"basis": "dct"}},
    "filter bank": {"frequency": {"mixer": "filter_bank", "filters": 2}},
    "complex mlp": {"frequency": {"mixer": "complex_mlp"}},
    "no mixing": {"frequency": {"mixer": "none"}},
    "sequential": {"frequency": {"order": "sequential"}},
    "residual fusion": {"frequency": {"fusion": "residual"}},
    "amplitude": {"frequency": {"representation": "amplitude"}},
    "mean pool": {"frequency": {"pool": "mean"}},
    "text transform": {"frequency": {"text_transform": "rfft"}},
    "average pool": {"image": {"pool": "avg"}},
    "no guide": {"merging": {"guide": "none"}},
    "spatial guide": {"merging": {"guide": "spatial"}},
    "frequency guide": {"merging": {"guide": "frequency"}},
    "energy guide": {"merging": {"frequency_guide": "energy"}},
    "plain attention": {"merging": {"proportional_attention": False}},
    "three-way": {"merging": {"granularity": "three_way"}},
    "overall rate": {"merging": {"keep_rate": 0.4, "overall": True}},
    "no merging": {"merging": {"keep_rate": 1.0}},
    "union": {"loss": {"token_domains": "union"}},
    "spatial tokens": {"loss": {"token_domains": "spatial"}},
    "frequency tokens only": {"loss": {"token_domains": "frequency", "frequency_weight": 0.0}},
    "consistency": {"loss": {"consistency_weight": 0.5, "frequency_weight": 0.0}},
    "words": {"loss": {"text_tokens": "words"}},
    "all text tokens": {"loss": {"text_tokens": "all"}},
    "equal weights": {"loss": {"weigh_by_size": False}},
    "no token terms": {"loss": {"token_weight": 0.0}},
    "global terms only in space": {
        "loss": {"frequency_weight": 0.0, "token_domains": "spatial"},
        "merging": {"guide": "spatial"},
    },
}


@pytest.mark.parametrize("sections", SWITCHES.values(), ids=SWITCHES.keys())
def test_every_switch_trains_every_parameter(sections):
    torch.manual_seed(0)
    config = changed(**sections)
    model = MLIP(config)
    images, text = batch()
    terms = MLIPLoss(config.loss)(model(images, text))
    terms["loss"].backward()
    assert all(torch.isfinite(term) for term in terms.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} takes no part in the loss"
        assert bool(parameter.grad.isfinite().all()), name


def test_switches_are_not_dead():
    losses = {}
    for name, sections in SWITCHES.items():
        torch.manual_seed(0)
        config = changed(**sections)
        losses[name] = float(MLIPLoss(config.loss)(MLIP(config)(*batch()))["loss"].detach())
    assert len(set(losses.values())) == len(losses), losses


@pytest.mark.parametrize("name", ["defaults", "spatial guide", "energy guide", "no merging", "sequential"])
def test_evaluation_mode_has_every_term_of_training(name):
    config = changed(**SWITCHES[name])
    model, loss = MLIP(config), MLIPLoss(config.loss)
    training = loss(model(*batch()))
    evaluation = loss(model.eval()(*batch()))
    assert training.keys() == evaluation.keys()
    for term, value in training.items():
        assert_close(evaluation[term].detach(), value.detach(), name=term)


@pytest.mark.parametrize("name", ["defaults", "spatial guide", "sequential"])
def test_the_encoded_image_is_the_feature_of_the_loss(name):
    model = MLIP(changed(**SWITCHES[name])).eval()
    images, text = batch()
    assert_close(model.encode_image(images, normalize=True), model(images, text).pairs["global_spatial"].image)
    assert_close(model.encode_text(text, normalize=True), model(images, text).pairs["global_spatial"].text)


def test_the_total_is_the_weighted_sum_of_its_terms():
    config = changed(loss={"frequency_weight": 0.3, "token_weight": 0.7, "consistency_weight": 0.2})
    terms = MLIPLoss(config.loss)(MLIP(config)(*batch()))
    expected = terms["global_spatial"] + 0.3 * terms["global_frequency"] + 0.2 * terms["consistency"]
    expected = expected + 0.7 * (terms["token_spatial"] + terms["token_frequency"]) / 2
    assert_close(terms["loss"].detach(), expected.detach())


def test_merging_leaves_the_tokens_its_schedule_says():
    encoded, frequency = MLIP(TINY).encode_image_tokens(batch()[0])
    # Each of three steps keeps six tenths of 36 patches, rounded up: 22, 14, 9.
    assert encoded.tokens.shape[1] == 9
    assert frequency.shape[1] == 36


def test_tokens_carry_the_patches_they_stand_for():
    encoded, _ = MLIP(TINY).encode_image_tokens(batch()[0])
    for sample in range(4):
        counts = torch.bincount(encoded.origin[sample], minlength=encoded.tokens.shape[1])
        assert_identical(encoded.size[sample], counts.float())


def test_frequency_tokens_stay_aligned_with_the_patches_after_every_merge():
    encoded, frequency = MLIP(TINY).encode_image_tokens(batch()[0])
    mean = torch.zeros_like(encoded.frequency_tokens)
    mean.scatter_add_(1, encoded.origin[..., None].expand_as(frequency), frequency.detach())
    assert_close(encoded.frequency_tokens.detach(), (mean / encoded.size[..., None]).detach())


def test_the_keep_rate_warms_up_from_one_and_holds_at_evaluation():
    model = MLIP(changed(merging={"warmup_steps": 10, "test_keep_rate": 0.5}))
    removed = [sum(model.merge_amounts(number)) for number in (0, 5, 10, 11)]
    assert removed[0] == 0
    assert 0 < removed[1] < removed[2] == removed[3]
    model.eval()
    assert sum(model.merge_amounts(0)) > removed[3]


def test_text_masks_find_the_end_even_where_zero_is_a_word():
    text = torch.tensor([[49406, 5, 0, 7, END, 0, 0, 0, 0]])
    taking_part = {
        choice: MLIP(changed(loss={"text_tokens": choice})).text_mask(text)[0].nonzero().flatten().tolist()
        for choice in ("words", "words_and_end", "all")
    }
    assert taking_part == {"words": [1, 2, 3], "words_and_end": [1, 2, 3, 4], "all": [0, 1, 2, 3, 4]}


def test_padding_text_changes_nothing():
    torch.manual_seed(0)
    model = MLIP(TINY).eval()
    images, text = batch()
    padded = text.clone()
    padded[:, 7:] = torch.randint(1, 400, (4, 2))
    one, other = (MLIPLoss(TINY.loss)(model(images, tokens))["loss"].detach() for tokens in (text, padded))
    assert_close(other, one)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = MLIP(TINY)
        model.set_gradient_checkpointing(enable)
        loss = MLIPLoss(TINY.loss)(model(*batch()))["loss"]
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, other in zip(*gradients, strict=True):
        assert_identical(other, one)


def test_reference_operators_give_the_same_loss():
    torch.manual_seed(0)
    model, loss = MLIP(TINY), MLIPLoss(TINY.loss)
    fused = loss(model(*batch()))["loss"].detach()
    with use_reference():
        assert_close(fused, loss(model(*batch()))["loss"].detach())


def test_logit_scales_stay_between_one_and_a_hundred():
    model = MLIP(TINY)
    model.logit_scale.data.fill_(9.0)
    model.logit_scale_tokens.data.fill_(-1.0)
    model.clamp_logit_scales()
    assert float(model.logit_scale.detach().exp()) == pytest.approx(100.0)
    assert float(model.logit_scale_tokens.detach().exp()) == 1.0


@pytest.mark.parametrize(
    ("images", "text", "error", "message"),
    [
        (torch.randn(2, 3, 32, 32), torch.ones(2, 9).long(), ValueError, "images: expected .B, 3, 48, 48."),
        (torch.randn(2, 3, 48, 48), torch.ones(2, 8).long(), ValueError, "text: expected .B, context_length = 9."),
        (torch.randn(2, 3, 48, 48), torch.ones(3, 9).long(), ValueError, "text: expected 2 captions"),
        (torch.randn(2, 3, 48, 48), torch.ones(2, 9), TypeError, "text: expected dtype int64"),
    ],
)
def test_a_wrong_batch_is_named(images, text, error, message):
    with pytest.raises(error, match=message):
        MLIP(TINY)(images, text)


def test_an_attention_it_does_not_know_is_refused():
    with pytest.raises(TypeError, match=r"block\.attn: expected timm\.layers\.Attention.*MultiheadAttention"):
        attend(nn.MultiheadAttention(8, 2), torch.randn(1, 3, 8), None)
