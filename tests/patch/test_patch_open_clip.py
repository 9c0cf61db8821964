"""Token merging in open_clip's image towers."""

import copy
import io
import json
import math
import pickle
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import _build_vision_tower
from open_clip.transformer import Attention, Transformer, VisionTransformer
from tiny_open_clip import SIZES, TOWERS, images, tiny
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mlip_kernels import merge_plan
from mlip_kernels.patch import open_clip as patch
from mlip_kernels.testing import assert_close, assert_identical

every_tower = pytest.mark.parametrize("name", TOWERS)


def outputs_of(tower: nn.Module, x: Tensor) -> list[Tensor]:
    with_all = tower.forward_intermediates(x, normalize_intermediates=tower.attn_pool is None, output_extra_tokens=True)
    early = tower.forward_intermediates(x, indices=[0, 1], stop_early=True, output_fmt="NLC", intermediates_only=True)
    return tree_leaves((tower(x), with_all, early))


@every_tower
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_changes_while_nothing_merges(name: str, checkpointing: bool):
    tower = tiny(name).train(checkpointing)
    tower.set_grad_checkpointing(checkpointing and name != "custom blocks")  # there it fails in open_clip itself
    x = images(tower)
    wanted = outputs_of(tower, x)
    patch.apply(tower, r=0)
    tower.set_grad_checkpointing(checkpointing)
    for now, before in zip(outputs_of(tower, x), wanted, strict=True):
        assert_identical(now, before)


def attention_of(block: nn.Module, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """What a block adds for its attention, and its keys averaged over the heads: written out."""
    attention, x = block.attn, block.ln_1(x)
    q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
    custom = isinstance(attention, Attention)
    q, k = (attention.ln_q(q), attention.ln_k(k)) if custom else (q, k)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + size.to(q.dtype).log()[:, None, None]
    out = scores.softmax(-1) @ v
    if custom:
        out = out if attention.head_scale is None else out * attention.head_scale
        out = attention.ln_inner(out.transpose(1, 2).flatten(2))
        return block.ls_1(block.ln_attn(attention.out_proj(out))), k.mean(1)
    return block.ls_1(attention.out_proj(out.transpose(1, 2).flatten(2))), k.mean(1)


def restated(tower: VisionTransformer, x: Tensor, r: int) -> Any:
    """The tower with merging blocks, one line after the other."""
    tokens, plans = tower._embeds(x), []
    size = torch.ones(tokens.shape[:2])
    for block in tower.transformer.resblocks:
        attended, keys = attention_of(block, tokens, size)
        plans.append(merge_plan(keys.detach(), r, size=size))
        tokens, size = plans[-1].merge(tokens + attended)
        tokens = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
    for plan in reversed(plans):
        tokens = plan.unmerge(tokens)
    pooled, tokens = tower._pool(tokens)
    return (pooled @ tower.proj, tokens) if tower.output_tokens else pooled @ tower.proj


@every_tower
@pytest.mark.parametrize("checkpointing", [False, True])
def test_merging_equals_its_restatement_with_gradients(name: str, checkpointing: bool):
    tower = tiny(name).double().train()
    x = images(tower).double()
    wanted = tree_leaves(restated(tower, x, 3))
    wanted.append(gradient_of(wanted, tower))
    patch.apply(tower, r=3)
    tower.set_grad_checkpointing(checkpointing)
    found = tree_leaves(tower(x))
    found.append(gradient_of(found, tower))
    for now, then in zip(found, wanted, strict=True):
        assert_close(now, then, roundings=2**10)


def gradient_of(outputs: list[Tensor], tower: nn.Module) -> Tensor:
    """Of all parameters in one: of some the gradient is nothing but rounding."""
    parameters = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    loss = sum(output.square().mean() for output in outputs)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, materialize_grads=True)])


@every_tower
def test_intermediates_have_a_token_for_every_patch(name: str):
    tower, x = tiny(name), images(tiny(name))
    shapes = [output.shape for output in outputs_of(tower, x)]
    before = outputs_of(tower, x)
    patch.apply(tower, r=3)
    after = outputs_of(tower, x)
    assert [output.shape for output in after] == shapes
    assert not any(torch.equal(a, b) for a, b in zip(after[-2:], before[-2:], strict=True))


@every_tower
def test_removing_the_patch_gives_the_model_back(name: str):
    tower = tiny(name)
    kinds, entries = [type(module) for module in tower.modules()], set(vars(tower.transformer))
    patch.apply(tower, r=3, guide="both")
    assert isinstance(tower, VisionTransformer)
    assert [type(module) for module in tower.modules()] != kinds
    patch.remove(tower)
    assert [type(module) for module in tower.modules()] == kinds
    assert set(vars(tower.transformer)) == entries


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP", "CoCa"])
def test_the_text_tower_is_never_touched(kind: str):
    model = whole(kind)
    text = [module for name, module in model.named_modules() if not name.startswith("visual")]
    kinds = [type(module) for module in text]
    patch.apply(model, r=2)
    assert [type(module) for module in text] == kinds
    assert isinstance(patch.image_tower(model), patch.MergingVisionTransformer)
    x, tokens = torch.randn(2, 3, 32, 32), torch.randint(0, 60, (2, 8))
    assert model.encode_image(x).shape == (2, 16)
    assert model.encode_text(tokens).shape == (2, 16)
    assert model.forward_intermediates(x, tokens)["image_intermediates"][-1].shape == (2, 32, 4, 4)
    assert len(tree_leaves(model(x, tokens))) >= 3
    patch.remove(model)
    assert not any(type(module).__name__.startswith("Merging") for module in model.modules())


def whole(kind: str) -> nn.Module:
    torch.manual_seed(1)
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2}
    if kind != "CoCa":
        return getattr(open_clip, kind)(16, vision, text).eval()
    vision |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text |= {"embed_cls": True, "output_tokens": True}
    decoder = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2, "mlp_ratio": 2}
    return open_clip.CoCa(16, decoder, text, vision).eval()


def test_state_dict_copies_and_pickles():
    tower = tiny()
    keys, x = list(tower.state_dict()), images(tower)
    patch.apply(tower, r=3)
    assert list(tower.state_dict()) == keys
    wanted = tower(x)
    for copied in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert_identical(copied(x), wanted)
    fresh = tiny(width=32)
    fresh.load_state_dict(tower.state_dict())
    assert_identical(patch.apply(fresh, r=3)(x), wanted)
    saved = io.BytesIO()
    torch.save(tower.state_dict(), saved)
    model = whole("CLIP")
    patch.apply(model, r=1)
    open_clip.factory.resize_pos_embed(model.visual.state_dict(), model)


def test_pruned_layers_merge_what_they_did():
    tower, x = tiny(layers=4), None
    x = images(tower)
    patch.apply(tower, r=[1, 2, 3, 4])
    wanted = tower.forward_intermediates(x, indices=[1], stop_early=True)["image_intermediates"]
    tower.prune_intermediate_layers([1])
    assert_identical(tower.forward_intermediates(x, indices=[1])["image_intermediates"][0], wanted[0])
    assert tower.r == [1, 2]


def test_locking_reaches_the_same_parameters():
    for unlocked in (0, 1, 2):
        plain, patched = tiny(), patch.apply(tiny(), r=2)
        plain.lock(unlocked_groups=unlocked)
        patched.lock(unlocked_groups=unlocked)
        assert [p.requires_grad for p in patched.parameters()] == [p.requires_grad for p in plain.parameters()]


def test_patch_dropout_merges_what_is_left_of_the_patches():
    tower = patch.apply(tiny(patch_dropout=0.5), keep_rate=0.5, layers=[1])
    x = images(tower)
    assert tower.train().forward_merged(x)[0].shape[1] == 1 + 4
    assert tower.eval().forward_merged(x)[0].shape[1] == 1 + 8
    patch.apply(tower, keep_rate=0.5, layers=[1], guide="frequency")
    assert tower.eval().forward_merged(x)[1].sum() == 2 * 17
    with pytest.raises(ValueError, match="patch dropout"):
        tower.train()(x)


def test_hooks_of_transformer_blocks_and_attention_run():
    tower, seen = patch.apply(tiny(), r=3), []
    for module in (tower.transformer, tower.transformer.resblocks[1], tower.transformer.resblocks[1].attn):
        module.register_forward_hook(lambda module, _, output: seen.append(tree_leaves(output)[0].shape[1]))
    tower(images(tower))
    assert seen == [14, 11, 17]


def test_merged_tokens_sizes_and_plan():
    tower = patch.apply(tiny(), r=3)
    x = images(tower)
    tokens, size, plan = tower.forward_merged(x)
    assert tokens.shape == (2, 8, 32)
    assert_identical(size.sum(1), torch.full((2,), 17.0))
    assert plan.merged_tokens == 8
    ordered, ordered_size, ordered_plan = tower.forward_merged(x, original_order=True)
    assert_identical(ordered_plan.unmerge(ordered), plan.unmerge(tokens))
    assert (ordered_plan.kept.diff(dim=1) > 0).all()
    assert_identical(ordered_size.sum(1), size.sum(1))
    assert tuple(patch.apply(tower, r=0).forward_merged(x)[1:]) == (None, None)


def test_settings_change_one_by_one():
    tower = patch.apply(tiny(), keep_rate=0.5, layers=[0, 1])
    assert tower.r == [8, 4, 0]
    patch.set_merging(tower, training_only=True)
    x = images(tower)
    assert tower.eval().forward_merged(x)[0].shape[1] == 17
    assert tower.train().forward_merged(x)[0].shape[1] == 5
    tower.r = 2
    assert tower.r == 2
    assert tower.merging.keep_rate is None


@pytest.mark.parametrize("trunk", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_a_timm_trunk_is_handed_to_the_patch_for_timm(trunk: str):
    model, x = nn.Module(), torch.randn(1, 3, 224, 224)
    config = {"timm_model_name": trunk, "timm_pool": "", "timm_proj": "linear"}
    model.visual = _build_vision_tower(16, config).eval()
    wanted = model.visual.forward_intermediates(x, indices=1, output_extra_tokens=True)
    patch.apply(model, r=0)
    found = model.visual.forward_intermediates(x, indices=1, output_extra_tokens=True)
    for now, before in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        assert_identical(now, before)
    patch.apply(model, r=1)
    assert model.visual.trunk.r == 1
    assert model.visual(x).shape == (1, 16)
    patch.set_merging(model, r=0)
    assert model.visual.trunk.r == 0
    patch.remove(model)
    assert type(model.visual.trunk).__module__.startswith("timm.")


@pytest.mark.parametrize("graph", ["compile", "export"])
def test_graphs(graph: str):
    tower = patch.apply(tiny(layers=2), r=3)
    x = images(tower)
    wanted = tower(x)
    if graph == "compile":
        found = torch.compile(tower, fullgraph=True, backend="aot_eager")(x)
    else:
        found = torch.export.export(tower, (x,)).module()(x)
    assert_close(found, wanted, roundings=64)


def build(name: str) -> nn.Module:
    """A model around the image tower of a built-in configuration, without memory."""
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    model = nn.Module()
    with torch.device("meta"):
        model.visual = _build_vision_tower(config["embed_dim"], vision, quick_gelu=config.get("quick_gelu", False))
    return model


def test_every_built_in_configuration_is_patched_or_refused_by_name():
    patched: list[str] = []
    refused: dict[str, str] = {}
    towers = {json.dumps(open_clip.get_model_config(name)["vision_cfg"]): name for name in open_clip.list_models()}
    for name in towers.values():
        model = build(name)
        try:
            patch.apply(model, r=1)
        except TypeError as failure:
            tower = model.visual.trunk if hasattr(model.visual, "trunk") else model.visual
            refused[type(tower).__name__] = str(failure)
        else:
            patched.append(name)
    assert len(patched) > len(towers) / 2
    assert {"EVA02-L-14-336", "PE-Core-B-16"} <= set(patched)
    assert not {"VisionTransformer", "VisionTransformerDistilled", "Eva"} & set(refused)
    assert all(f" {kind}" in message for kind, message in refused.items())


class OwnForward(Transformer):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return x


def with_part(place: str, part: nn.Module) -> VisionTransformer:
    tower = tiny()
    parent, _, name = place.rpartition(".")
    setattr(tower.get_submodule(parent), name, part)
    return tower


def with_bias_k() -> nn.Module:
    return nn.MultiheadAttention(32, 2, batch_first=True, add_bias_kv=True)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (lambda: nn.Linear(1, 1), "model: expected an open_clip model .*, got Linear"),
        (lambda: build("RN50"), "whose visual is a ModifiedResNet without tokens"),
        (lambda: build("convnext_base"), r"visual.trunk: expected a timm VisionTransformer .*, got ConvNeXt"),
        (lambda: tiny(scaled_cosine_attn=True), r"resblocks\[0\].attn: .* scaled cosine attention"),
        (lambda: with_part("transformer", OwnForward(32, 2, 2)), "visual.transformer: .* has its own forward"),
        (lambda: with_part("transformer.resblocks.1", nn.Identity()), r"resblocks\[1\]: .*, got Identity"),
        (lambda: with_part("transformer.resblocks.1.attn", nn.Identity()), r"resblocks\[1\].attn: .*, got Identity"),
        (lambda: with_part("transformer.resblocks.2.attn", with_bias_k()), r"resblocks\[2\].attn: .* bias_k"),
    ],
)
def test_what_is_not_handled_is_refused_by_name_and_left_as_it_was(model: Any, error: str):
    model = model()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=error):
        patch.apply(model, r=1)
    assert [type(module) for module in model.modules()] == kinds


def test_several_towers_and_bad_settings():
    with pytest.raises(ValueError, match=r"2 of them; give one of model.0, model.1"):
        patch.apply(nn.Sequential(tiny(), tiny()))
    tower = tiny()
    with pytest.raises(ValueError, match="keep_rate"):
        patch.apply(tower, keep_rate=2.0)
    with pytest.raises(TypeError, match="call apply first"):
        patch.set_merging(tower, r=1)
    assert type(tower) is VisionTransformer
    patch.apply(tower, r=1)
    with pytest.raises(ValueError, match="attn_mask: expected None while tokens merge"):
        tower.transformer(torch.randn(1, 17, SIZES["width"]), attn_mask=torch.zeros(17, 17))


def test_a_setting_that_does_not_exist_is_named():
    with pytest.raises(TypeError, match="ratio: expected one of the settings r, keep_rate"):
        patch.apply(tiny(), ratio=0.5)
