"""Token merging in timm's vision transformers."""

import copy
import pickle
from typing import Any

import pytest
import timm
import tiny_vit
import torch
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock, VisionTransformer
from tiny_vit import images
from torch import Tensor, nn

from mlip_kernels import token_energy
from mlip_kernels.nn.guidance import GUIDES, Guide, GuideContext, both, spatial
from mlip_kernels.nn.merging_blocks import MergeRule, MergeState, MergeStep
from mlip_kernels.patch import timm as patch
from mlip_kernels.testing import assert_close, assert_identical

FAMILIES: dict[str, dict[str, Any]] = {
    "vit_small_patch16_224": {},
    "vit_base_patch32_clip_224": {"patch_size": 16},  # norm before the blocks
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_base_patch16_siglip_224": {},  # attention pooling, no class token
    "vit_base_patch16_siglip_gap_224": {},
    "vit_small_patch14_dinov2": {"patch_size": 16},  # LayerScale
    "vit_small_patch14_reg4_dinov2": {"patch_size": 16},  # registers
    "vit_medium_patch16_reg4_gap_256": {},  # registers, no class token, average pooling
    "vit_mediumd_patch16_reg4_gap_256": {},
    "vit_small_patch16_36x1_224": {},
    "vit_so150m_patch16_reg4_map_256": {},
    "vit_intern300m_patch14_448": {"patch_size": 16},
    "vit_betwixt_patch16_reg1_gap_256": {},
    "aimv2_large_patch14_224": {"patch_size": 16},  # RMSNorm, SwiGLU
    "flexivit_small": {},
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},  # distillation token
    "deit3_small_patch16_224": {},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "qk_norm": {"qk_norm": True},
    "post_norm": {"block_fn": ResPostBlock, "init_values": 0.5},
    "scale_norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "average of patches": {"global_pool": "avg"},
    "average with the class token": {"global_pool": "avg", "pool_include_prefix": True},
    "maximum": {"global_pool": "avgmax"},
    "all tokens": {"global_pool": ""},
}


def tiny(name: str = "vit_small_patch16_224", **changed: Any) -> nn.Module:
    return tiny_vit.tiny(name, **(FAMILIES[name] | changed))


def rule(model: nn.Module, **changed: Any) -> MergeRule:
    settings = {"guide": None, "guide_weight": 1.0, "proportional_attention": True} | changed
    return MergeRule(model.num_prefix_tokens, model.cls_token is not None, **settings)


def outputs_of(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return model(x), model.forward_features(x), *model.forward_intermediates(x)[1]


MODELS = [pytest.param(name, {}, id=name) for name in FAMILIES] + [
    pytest.param("vit_small_patch16_224", changed, id=name) for name, changed in VARIANTS.items()
]


@pytest.mark.parametrize(("name", "changed"), MODELS)
def test_nothing_changes_while_nothing_merges(name: str, changed: dict[str, Any]):
    model, x = tiny(name, **changed), images()
    outputs = outputs_of(model, x)
    patch.apply(model)
    for now, before in zip(outputs_of(model, x), outputs, strict=True):
        assert_identical(now, before)


@pytest.mark.parametrize(("name", "changed"), MODELS)
def test_a_merging_block_computes_what_timms_does(name: str, changed: dict[str, Any]):
    model = tiny(name, **changed).double()
    tokens = torch.randn(2, 9, 48, dtype=torch.float64)
    wanted = [block(tokens) for block in model.blocks]
    patch.apply(model)
    step = MergeStep(MergeState(tokens, torch.ones(2, 9)), 0, rule(model))
    for block, output in zip(model.blocks, wanted, strict=True):
        assert_close(block(tokens, merging=step), output)


def in_equal_pairs(x: Tensor, prefix_tokens: int) -> Tensor:
    """Images whose patches are equal in pairs of neighbours, the first of them at an even position of the sequence."""
    patches = x.reshape(-1, 3, 4, 16, 4, 16).permute(0, 2, 4, 1, 3, 5).flatten(1, 2).clone()
    first = prefix_tokens % 2
    patches[:, first + 1 :: 2] = patches[:, first:-1:2]
    return patches.unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


@pytest.mark.parametrize(("r", "equal"), [([0, 7, 0], "pairs"), ((3, -0.5), "all")])
@pytest.mark.parametrize(("name", "changed"), MODELS)
def test_merging_equal_tokens_changes_nothing(name: str, changed: dict[str, Any], r: Any, equal: str):
    """However the tokens are pooled, if attention and pooling count a merged token for all it stands for."""
    model = tiny(name, **changed).double()
    if model.pos_embed is not None:
        nn.init.zeros_(model.pos_embed)
    x = images().double()
    x = in_equal_pairs(x, model.num_prefix_tokens) if equal == "pairs" else x[:, :, :16, :16].repeat(1, 1, 4, 4)
    wanted = outputs_of(model, x)
    patch.apply(model, r)
    for now, before in zip(outputs_of(model, x), wanted, strict=True):
        assert_close(now, before, roundings=64)
    tokens, size, plan = model.forward_merged(x)
    assert tokens.shape[1] == plan.merged_tokens < model.num_prefix_tokens + 16
    assert_identical(size[:, : model.num_prefix_tokens], torch.ones(2, model.num_prefix_tokens))
    assert_identical(size.sum(1), torch.full((2,), model.num_prefix_tokens + 16.0))


def test_registers_and_distillation_tokens_stay():
    for name, prefix in (("vit_small_patch14_reg4_dinov2", 5), ("deit_tiny_distilled_patch16_224", 2)):
        model = patch.apply(tiny(name), r=3)
        plan = model.forward_merged(images())[2]
        assert_identical(plan.assignment[:, :prefix], torch.arange(prefix).expand(2, prefix))


def test_tokens_merge_by_what_is_asked_for():
    model, x = patch.apply(tiny(), keep_rate=0.5, layers=[1]), images()
    assert model.forward_merged(x)[0].shape[1] == 1 + 8
    model.r = 2
    assert model.forward_merged(x)[0].shape[1] == 1 + 16 - 6
    patch.apply(model, [5])
    assert model.forward_merged(x)[0].shape[1] == 1 + 11
    assert model.r == [5]


def test_a_flat_image_keeps_its_tokens_apart_where_that_is_asked_for():
    model, flat = tiny(), torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        model.pos_embed.zero_()
    patch.apply(model, [4, 0, 0])
    assert float(model.forward_merged(flat)[1].max()) == 5
    patch.apply(model, [4, 0, 0], max_merges=1)
    assert float(model.forward_merged(flat)[1].max()) == 2


def test_a_small_image_merges_what_it_has():
    model = patch.apply(tiny(), r=100)
    assert model.forward_merged(images())[0].shape[1] == 1 + 2


class Watched:
    """A guide that keeps what it was given."""

    def __init__(self, guide: Guide) -> None:
        self.guide = guide
        self.contexts: list[GuideContext] = []

    def __call__(self, context: GuideContext) -> Tensor:
        self.contexts.append(context)
        return self.guide(context)


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_base_patch16_siglip_224"])
@pytest.mark.parametrize("guide", sorted(GUIDES))
def test_the_least_informative_tokens_merge(guide: str, name: str):
    """A guide that outweighs similarity decides alone."""
    model = tiny(name)
    watched = Watched(GUIDES[guide])
    patch.apply(model, [0, 4, 0], guide=watched, guide_weight=100.0, energy_cutoff=0.5)
    plan = model.forward_merged(images())[2]
    first = model.num_prefix_tokens + model.num_prefix_tokens % 2
    ranks = GUIDES[guide](watched.contexts[0])
    merged = torch.zeros_like(ranks).scatter(1, plan.removed, 1.0).bool()[:, first::2]
    assert_identical(merged.sum(1), torch.tensor([4, 4]))
    sources = ranks[:, first::2]
    assert (sources.where(merged, -1).amax(1) <= sources.where(~merged, 2).amin(1)).all()
    patch.apply(model, [0, 4, 0], guide=guide, guide_weight=100.0)
    assert_identical(model.forward_merged(images())[2].removed, plan.removed)


def test_class_attention_is_the_row_of_the_class_token():
    model = tiny().double()
    watched = Watched(spatial)
    patch.apply(model, [2, 2, 0], guide=watched)
    model.forward_merged(images().double())
    for context in watched.contexts:
        size = torch.ones(2, context.tokens.shape[1]) if context.size is None else context.size
        logits = torch.einsum("bhd,bhnd->bhn", context.query, context.keys) * context.keys.shape[-1] ** -0.5
        row = (logits + size.log()[:, None]).softmax(-1).mean(1)
        assert_identical(spatial(context)[:, 1:].argsort(1), row[:, 1:].argsort(1))


def test_energy_follows_the_patches_through_merges():
    model = tiny()
    watched = Watched(both)
    patch.apply(model, 3, guide=watched, energy_cutoff=0.3)
    model.forward_merged(images())
    energy = watched.contexts[0].energy
    wanted = token_energy(model._pos_embed(model.patch_embed(images())), 0.3, grid=(4, 4), prefix_tokens=1)
    assert_close(energy, wanted)
    for context in watched.contexts[1:]:
        for token in range(1, context.tokens.shape[1]):
            members = context.origin == token
            mean = torch.stack([e[m].mean() for e, m in zip(energy, members, strict=True)])
            assert_close(context.energy[:, token], mean)


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_base_patch16_siglip_224"])
def test_padding_neither_merges_nor_is_attended_to(name: str):
    model, x = patch.apply(tiny(name), [2, 2, 0]), images()
    prefix = model.num_prefix_tokens
    mask = torch.ones(2, prefix + 16, dtype=torch.bool)
    mask[0, prefix + 12 :] = False
    tokens, size, plan = model.forward_merged(x, attn_mask=mask[:, None, None])
    changed = x.clone()
    changed[0, :, 48:] += 3.0  # the masked patches
    again = model.forward_merged(changed, attn_mask=mask)
    real = plan.mask
    assert_close(again[0][real], tokens[real])
    assert_identical(size[0].sum(), torch.tensor(prefix + 12.0))
    assert_identical(plan.assignment, again[2].assignment)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains(checkpointing: bool):
    """Gradients of all parameters; recomputing activations gives the same ones."""
    model = patch.apply(tiny("deit3_small_patch16_224", drop_path_rate=0.3), r=3, guide="both").train()
    gradients = []
    for recompute in (False, checkpointing):
        torch.manual_seed(3)
        model.zero_grad()
        model.set_grad_checkpointing(recompute)
        model(images()).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients[0])
    for one, other in zip(*gradients, strict=True):
        assert_identical(one, other)


def test_patches_may_be_dropped_in_training():
    model = patch.apply(tiny(patch_drop_rate=0.5), r=1).train()
    assert model.forward_merged(images())[0].shape[1] == 1 + 8 - 3
    with pytest.raises(ValueError, match="guide: 'frequency' needs all patches of a grid"):
        patch.apply(model, r=1, guide="frequency")(images())


def test_a_patched_model_is_copied_and_pickled():
    model, x = patch.apply(tiny("vit_small_patch14_reg4_dinov2"), r=3, guide="both"), images()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_identical(other(x), model(x))
        other.r = 0
        assert model.r == 3


def test_removing_restores_the_model():
    model, x = tiny(), images()
    before, names, attributes = model(x), list(model.state_dict()), set(vars(model))
    patch.remove(patch.apply(patch.apply(model, r=3), r=4))
    assert type(model) is VisionTransformer
    assert all(type(block) is Block for block in model.blocks)
    assert set(vars(model)) == attributes
    assert list(model.state_dict()) == names
    assert_identical(patch.remove(model)(x), before)


def test_hooks_of_blocks_still_run():
    model, seen = patch.apply(tiny(), [2, 0, 0]), []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: seen.append(1))
    model(images())
    assert len(seen) == 3


@pytest.mark.parametrize("guide", [None, "both"])
def test_it_compiles_into_one_graph(guide: str | None):
    model, x = patch.apply(tiny(), r=3, guide=guide), images()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(x), model(x))


def test_it_is_exported():
    model, x = patch.apply(tiny(), r=3), images()
    exported = torch.export.export(model, (x,)).module()
    assert_close(exported(x), model(x))


def test_intermediates_have_timms_forms():
    model, x = tiny("vit_small_patch14_reg4_dinov2"), images()
    forms = [
        {"indices": 2, "norm": True, "output_fmt": "NLC", "return_prefix_tokens": True},
        {"indices": [1], "stop_early": True, "intermediates_only": True},
        {"indices": [2, 0]},  # come in the order of the blocks
        {"output_dict": True, "return_prefix_tokens": True},
        {"output_dict": True, "intermediates_only": True},
    ]
    wanted = [model.forward_intermediates(x, **form) for form in forms]
    patch.apply(model)
    for form, before in zip(forms, wanted, strict=True):
        now = model.forward_intermediates(x, **form)
        leaves, structure = torch.utils._pytree.tree_flatten(now)
        leaves_before, structure_before = torch.utils._pytree.tree_flatten(before)
        assert structure == structure_before
        for one, other in zip(leaves, leaves_before, strict=True):
            assert_identical(one, other)
    model.r = 2
    assert model.forward_intermediates(x)[1][2].shape == (2, 48, 4, 4)
    assert model.get_intermediate_layers(x, n=1)[0].shape == (2, 16, 48)


def test_masks_and_causal_attention_work_as_before_while_nothing_merges():
    model, x = tiny(), images()
    mask = torch.ones(17, 17).tril().bool()
    wanted = model(x, attn_mask=mask), model(x, is_causal=True)
    patch.apply(model)
    assert_identical(model(x, attn_mask=mask), wanted[0])
    assert_identical(model(x, is_causal=True), wanted[1])
    model.r = 1
    with pytest.raises(ValueError, match=r"attn_mask: expected a boolean mask of keys .*\[17, 17\]"):
        model(x, attn_mask=mask)
    with pytest.raises(ValueError, match="is_causal: expected False while tokens merge"):
        model(x, is_causal=True)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "mixer_s32_224", "resnet18"])
def test_a_model_it_does_not_know_is_refused(name: str):
    model = timm.create_model(name)
    kind = type(model)
    with pytest.raises(TypeError, match=f"model: expected a timm VisionTransformer .*got {kind.__name__}"):
        patch.apply(model, r=2)
    assert type(model) is kind


def test_a_block_it_does_not_know_is_refused():
    model = tiny(block_fn=ParallelThingsBlock)
    with pytest.raises(TypeError, match=r"model.blocks\[0\]: expected a timm Block .*got ParallelThingsBlock"):
        patch.apply(model, r=2)
    with pytest.raises(TypeError, match=r"model.blocks\[0\].attn: expected timm.layers.Attention, got DiffAttention"):
        patch.apply(tiny(attn_layer="diff", num_heads=2), r=2)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"r": -1}, ValueError, "r"),
        ({"r": 2.5}, TypeError, "r"),
        ({"r": 2, "keep_rate": 0.5}, ValueError, "keep_rate: expected either r or keep_rate"),
        ({"keep_rate": 0.2}, ValueError, "keep_rate"),
        ({"r": 2, "guide": "wavelet"}, ValueError, "guide: expected one of .*got 'wavelet'"),
        ({"r": 2, "guide": 3}, TypeError, "guide: expected one of"),
        ({"r": 2, "max_merges": 0}, ValueError, "max_merges: .*0"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_changes(settings: dict[str, Any], error: type, message: str):
    model = tiny()
    with pytest.raises(error, match=message):
        patch.apply(model, **settings)
    assert type(model) is VisionTransformer
