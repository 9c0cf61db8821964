"""Token merging in Hugging Face's vision models."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers", reason="needs transformers: pip install transformers")

from tiny_transformers import MODELS, inputs, tiny, whole
from transformers import (
    AltCLIPVisionConfig,
    AltCLIPVisionModel,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from mlip_kernels import merge_plan
from mlip_kernels.patch import transformers as patch
from mlip_kernels.testing import assert_close, assert_identical

every_model = pytest.mark.parametrize("name", MODELS)
kernels_of_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def outputs_of(model: PreTrainedModel, given: dict[str, Tensor]) -> list[Tensor]:
    found = model(**given, output_hidden_states=True)
    return [*found.hidden_states, found.last_hidden_state, found.pooler_output]


@every_model
@kernels_of_attention
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_changes_while_nothing_merges(name: str, attention: str, checkpointing: bool):
    model, given = tiny(name, attn_implementation=attention).train(checkpointing), inputs(name)
    wanted = outputs_of(model, given)
    patch.apply(model, r=0)
    if checkpointing:
        model.gradient_checkpointing_enable()
    for now, before in zip(outputs_of(model, given), wanted, strict=True):
        assert_identical(now, before)


def attention_of(layer: nn.Module, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer adds for its attention, and its keys averaged over the heads: written out."""
    attention, x = layer.self_attn, layer.layer_norm1(x)
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    q, k, v = (one(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for one in projections)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + size.to(q.dtype).log()[:, None, None]
    return attention.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), k.mean(1)


def restated(model: PreTrainedModel, given: dict[str, Tensor], r: int) -> list[Tensor]:
    """Hidden states and pooled output of a merging model, one line after the other."""
    clip, mask = hasattr(model, "pre_layrnorm"), given.get("pixel_attention_mask")
    tokens = model.embeddings(given["pixel_values"], *([given["spatial_shapes"]] if mask is not None else []))
    tokens = model.pre_layrnorm(tokens) if clip else tokens
    real = None if mask is None else mask.bool()
    size = torch.ones(tokens.shape[:2]) if real is None else real.float()
    whole, states = None, [tokens]
    for layer in model.encoder.layers:
        attended, keys = attention_of(layer, tokens, size)
        plan = merge_plan(keys.detach(), r, size=size, mask=real, prefix_tokens=int(clip))
        tokens, size = plan.merge(tokens + attended)
        tokens, real = tokens + layer.mlp(layer.layer_norm2(tokens)), plan.mask
        whole = plan if whole is None else whole.then(plan)
        states.append(whole.unmerge(tokens))
    if clip:
        return [*states, model.post_layernorm(states[-1][:, 0])]
    return [*states, model.head(model.post_layernorm(states[-1]), *([] if mask is None else [mask]))]


@every_model
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "checkpointed", "checkpointed, reentrant"])
def test_merging_equals_its_restatement_with_gradients(name: str, reentrant: bool | None):
    model, given = tiny(name).double().train(), inputs(name, torch.float64)
    wanted = restated(model, given, 3)
    wanted.append(gradient_of(wanted[-1], model))
    patch.apply(model, r=3)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    result = model(**given, output_hidden_states=True)
    found = [*result.hidden_states, result.pooler_output]
    found.append(gradient_of(result.pooler_output, model))
    for now, then in zip(found, wanted, strict=True):
        assert_close(now, then, roundings=2**10)


def gradient_of(output: Tensor, model: nn.Module) -> Tensor:
    """Of all parameters of the layers in one: of some the gradient is nothing but rounding."""
    model.zero_grad()
    output.square().mean().backward()  # reentrant checkpoints know no torch.autograd.grad
    return torch.cat([parameter.grad.flatten() for parameter in model.encoder.parameters()])


def test_padding_is_neither_merged_nor_attended_to():
    model, given = patch.apply(tiny("SigLIP 2"), r=3), inputs("SigLIP 2")
    wanted = model(**given).pooler_output
    given["pixel_values"] = torch.where(given["pixel_attention_mask"][..., None] > 0, given["pixel_values"], 9.0)
    assert_identical(model(**given).pooler_output, wanted)


@every_model
def test_hidden_states_by_index(name: str):
    model, given = patch.apply(tiny(name), r=3), inputs(name)
    states = model(**given, output_hidden_states=True).hidden_states
    chosen = model(**given, output_hidden_states=[-2, 1]).hidden_states
    assert [state is not None for state in chosen] == [False, True, True, False]
    assert_identical(chosen[1], states[1])
    assert_identical(chosen[2], states[2])


@every_model
def test_attention_maps_are_refused_while_tokens_merge(name: str):
    model, given = patch.apply(tiny(name, attn_implementation="eager"), r=3), inputs(name)
    with pytest.raises(ValueError, match="output_attentions: expected False while tokens merge"):
        model(**given, output_attentions=True)
    patch.set_merging(model, r=0)
    assert len(model(**given, output_attentions=True).attentions) == 3


@every_model
def test_removing_the_patch_gives_the_model_back(name: str):
    model = tiny(name)
    kinds, entries = [type(module) for module in model.modules()], [set(vars(module)) for module in model.modules()]
    patch.apply(model, r=3, guide="spatial")
    assert type(model) is MODELS[name][0]
    assert type(model.encoder.layers[0]).__name__ in model._no_split_modules
    patch.remove(model)
    assert [type(module) for module in model.modules()] == kinds
    assert [set(vars(module)) for module in model.modules()] == entries


@every_model
def test_state_dict_copies_pickles_and_saved_models(name: str, tmp_path: Any):
    model, given = tiny(name), inputs(name)
    keys = list(model.state_dict())
    patch.apply(model, r=3)
    assert list(model.state_dict()) == keys
    wanted = model(**given).pooler_output
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_identical(copied(**given).pooler_output, wanted)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.architectures == [MODELS[name][0].__name__]
    assert not type(loaded.encoder).__module__.startswith("mlip_kernels")
    assert_identical(patch.apply(loaded, r=3)(**given).pooler_output, wanted)


@pytest.mark.parametrize("owner", [CLIPModel, CLIPVisionModelWithProjection, CLIPForImageClassification])
def test_models_that_hold_a_vision_model(owner: Any):
    config = whole(num_labels=3)
    model = owner(config if owner is not CLIPVisionModelWithProjection else config.vision_config).eval()
    given = inputs("CLIP")
    if owner is CLIPModel:
        text = [module for name, module in model.named_modules() if name.startswith("text")]
        kinds = [type(module) for module in text]
        given |= {"input_ids": torch.randint(0, 63, (2, 8))}
    before = model(**given)[0]
    patch.apply(model, r=2)
    assert patch.merging_of(model).r == 2
    after = model(**given)[0]
    assert after.shape == before.shape
    assert not torch.equal(after, before)
    if owner is CLIPModel:
        assert [type(module) for module in text] == kinds
        features = model.get_image_features(given["pixel_values"])
        assert features.last_hidden_state.shape == (2, 17, 32)
        assert model(**given, return_loss=True).loss.isfinite()
    assert_identical(patch.remove(model)(**given)[0], before)


def test_images_of_another_size():
    model = patch.apply(tiny("CLIP"), keep_rate=0.5, layers=[1])
    wide = {"pixel_values": torch.randn(2, 3, 32, 48), "interpolate_pos_encoding": True}
    assert model(**wide, output_hidden_states=True).hidden_states[-1].shape == (2, 1 + 24, 32)
    patch.set_merging(model, guide="frequency")
    assert model(**inputs("CLIP"), interpolate_pos_encoding=True).pooler_output.isfinite().all()
    with pytest.raises(ValueError, match="pixel_values: expected 32 x 32 pixels where the guide reads"):
        model(pixel_values=torch.randn(2, 3, 16, 64), interpolate_pos_encoding=True)


def test_a_guide_that_reads_frequencies_needs_one_grid_for_all_images():
    model = tiny("SigLIP 2")
    with pytest.raises(ValueError, match="guide: expected one that reads no frequencies for Siglip2VisionModel"):
        patch.apply(model, r=2, guide="both")
    patch.apply(model, r=2, guide="spatial")
    with pytest.raises(ValueError, match="guide"):
        patch.set_merging(model, guide="frequency")
    assert patch.merging_of(model).r == 2


def test_settings_change_one_by_one():
    model = patch.apply(tiny("SigLIP"), keep_rate=0.5, layers=[0])
    patch.set_merging(model, training_only=True)
    lengths = []
    model.encoder.layers[2].register_forward_hook(lambda module, _, output: lengths.append(output.shape[1]))
    model.eval()(**inputs("SigLIP"))
    model.train()(**inputs("SigLIP"))
    assert lengths == [16, 8]


@every_model
def test_graphs(name: str):
    model, given = patch.apply(tiny(name), r=3), inputs(name)
    wanted = model(**given).pooler_output
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(**given).pooler_output
    assert_close(found, wanted, roundings=64)


@every_model
def test_bfloat16(name: str):
    model = patch.apply(tiny(name).bfloat16(), r=3)
    found = tree_leaves(model(**inputs(name, torch.bfloat16)))
    assert all(output.dtype == torch.bfloat16 for output in found)


def test_hooks_of_accelerate_follow():
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate: pip install accelerate")
    model, given = tiny("CLIP"), inputs("CLIP")
    for module in (model.encoder, *model.encoder.layers, *(layer.self_attn for layer in model.encoder.layers)):
        hooks.add_hook_to_module(module, hooks.ModelHook())
    before = model(**given).pooler_output
    patch.apply(model, r=3)
    merged = model(**given).pooler_output
    assert_identical(merged, patch.apply(tiny("CLIP"), r=3)(**given).pooler_output)
    assert_identical(patch.remove(model)(**given).pooler_output, before)


def with_part(name: str, part: nn.Module) -> PreTrainedModel:
    model = tiny("CLIP")
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, part)
    return model


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (lambda: nn.Linear(1, 1), "model: expected a model with a CLIPVisionModel, .*, got Linear"),
        (lambda: nn.Sequential(other_copy()), "its 0 is a AltCLIPVisionModel of transformers.models.altclip"),
        (lambda: with_part("encoder.layers.1", nn.Identity()), r"encoder.layers\[1\]: .*, got Identity"),
        (lambda: with_part("encoder.layers.1.self_attn", nn.Identity()), r"layers\[1\].self_attn: .*, got Identity"),
    ],
)
def test_what_is_not_handled_is_refused_by_name_and_left_as_it_was(model: Any, error: str):
    model = model()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=error):
        patch.apply(model, r=1)
    assert [type(module) for module in model.modules()] == kinds


def other_copy() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AltCLIPVisionModel(AltCLIPVisionConfig(image_size=32, patch_size=8, **sizes))


def test_several_models_and_bad_settings():
    with pytest.raises(ValueError, match=r"with 2 of them; give one of model.0, model.1"):
        patch.apply(nn.Sequential(tiny("CLIP"), tiny("SigLIP")))
    with pytest.raises(TypeError, match="call apply first"):
        patch.set_merging(tiny("CLIP"), r=1)
    with pytest.raises(ValueError, match="keep_rate"):
        patch.apply(tiny("CLIP"), keep_rate=2.0)


def test_a_setting_that_does_not_exist_is_named():
    with pytest.raises(TypeError, match="ratio: expected one of the settings r, keep_rate"):
        patch.apply(tiny("CLIP"), ratio=0.5)
