"""Token merging in timm's EVA-type transformers, whose positions are rotations."""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block
from tiny_eva import BUILT, NAMED, tiny
from tiny_vit import TINY, images
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils._pytree import tree_leaves

from mlip_kernels import merge_plan
from mlip_kernels.patch import timm as patch
from mlip_kernels.patch.timm import MergingEva
from mlip_kernels.testing import assert_close, assert_identical

every_kind = pytest.mark.parametrize("name", [*NAMED, *BUILT])


def outputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    forms = [
        {"return_prefix_tokens": model.num_prefix_tokens > 0, "norm": True},
        {"indices": [0, 1], "stop_early": True, "output_fmt": "NLC", "intermediates_only": True},
    ]
    if model.patch_drop is not None and model.training:  # then timm's intermediates have no grid
        forms = forms[1:]
    return tree_leaves((model(x), model.forward_features(x), [model.forward_intermediates(x, **f) for f in forms]))


def gradients_of(outputs: list[Tensor], model: nn.Module) -> list[Tensor]:
    """Of all parameters in one, as of some the gradient is nothing but rounding; of frequencies, which are float32."""
    loss = sum(output.square().mean() for output in outputs)
    whole, frequencies = [], []
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        (frequencies if name == "rope.freqs" else whole).append(gradient.flatten())
    return [torch.cat(whole), *(gradient.float() for gradient in frequencies)]


@every_kind
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_changes_while_nothing_merges(name: str, checkpointing: bool):
    model, x = tiny(name).train(checkpointing), images()
    model.set_grad_checkpointing(checkpointing)
    wanted = outputs_of(model, x)
    wanted += gradients_of(wanted[:1], model)
    patch.apply(model)
    assert isinstance(model, MergingEva)
    found = outputs_of(model, x)
    found += gradients_of(found[:1], model)
    for now, before in zip(found, wanted, strict=True):
        assert_identical(now, before)


def turned(x: Tensor, table: Tensor, halves: bool) -> Tensor:
    """Pairs of channels, rotated; a table of means may shorten them."""
    sine, cosine = table.chunk(2, -1)
    pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2) if halves else x.unflatten(-1, (-1, 2))
    sine, cosine = (t[..., : t.shape[-1] // 2] if halves else t[..., ::2] for t in (sine, cosine))
    a, b = pairs.unbind(-1)
    out = torch.stack([a * cosine - b * sine, b * cosine + a * sine], -1)
    return (out.transpose(-1, -2) if halves else out).flatten(-2)


def attention_of(attn: nn.Module, x: Tensor, table: Tensor | None, size: Tensor) -> tuple[Tensor, Tensor]:
    """What attention returns, and its keys averaged over the heads: written out."""
    if attn.qkv is None:
        q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    else:
        bias = getattr(attn, "q_bias", None)
        bias = 0 if bias is None else torch.cat([bias, torch.zeros_like(bias), attn.v_bias])
        q, k, v = (attn.qkv(x) + bias).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for part in (q, k, v))
    q, k = attn.q_norm(q), attn.k_norm(k)
    if table is not None:
        first = attn.num_prefix_tokens
        q, k = (
            torch.cat([part[:, :, :first], turned(part[:, :, first:], table, attn.rotate_half)], 2) for part in (q, k)
        )
    metric = k.mean(1)
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    scores = q @ k.transpose(-1, -2) * attn.head_dim**-0.5 + size.to(q.dtype).log()[:, None, None]
    out = attn.norm((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj(out), metric


def mean_table(table: Tensor | None, origin: Tensor | None, first: int) -> Tensor | None:
    """The table of merged tokens: the mean of those of the patches that each stands for."""
    if table is None or origin is None:
        return table
    members = torch.nn.functional.one_hot(origin[:, first:] - first).to(table.dtype).transpose(1, 2)
    table = table.reshape((1,) * (4 - table.ndim) + table.shape)
    return (members / members.sum(-1, keepdim=True))[:, None] @ table


def restated(model: Eva, x: Tensor, r: list[int]) -> list[Tensor]:
    """The model with merging blocks, one line after the other: logits and features."""
    torch.manual_seed(3)
    tokens, rope = model._pos_embed(model.patch_embed(x))
    tokens, first, plans, origin = model.norm_pre(tokens), model.num_prefix_tokens, [], None
    size = torch.ones(tokens.shape[:2])
    for index, block in enumerate(model.blocks):
        table = mean_table(rope[index] if model.rope_mixed else rope, origin, first)
        before = isinstance(block, EvaBlock)
        out, metric = attention_of(block.attn, block.norm1(tokens) if before else tokens, table, size)
        scales = [getattr(block, f"gamma_{i}", None) for i in (1, 2)]
        out = out if before else block.norm1(out)
        tokens = tokens + (out if scales[0] is None else scales[0] * out)
        plans.append(merge_plan(metric.detach(), r[index], size=size, prefix_tokens=first))
        origin = plans[-1].track(origin)
        tokens, size = plans[-1].merge(tokens)
        out = block.mlp(block.norm2(tokens)) if before else block.norm2(block.mlp(tokens))
        tokens = tokens + (out if scales[1] is None else scales[1] * out)
    features = model.norm(tokens.gather(1, origin[..., None].expand(-1, -1, tokens.shape[2])))
    return [model.forward_head(features), features]


def in_double(model: Eva) -> Eva:
    """Tables too, which timm makes in float32."""
    model.double()
    if model.rope is not None:
        table = model.rope.get_embed
        model.rope.get_embed = lambda *arguments, **named: table(*arguments, **named).double()
    return model


@every_kind
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_merging_equals_its_restatement_with_gradients(name: str, checkpointing: bool, fused: bool):
    model, x = in_double(tiny(name)).train(), images().double()
    wanted = restated(model, x, [3, 0, 2])
    wanted += gradients_of(wanted, model)
    patch.apply(model, [3, 0, 2])
    model.set_grad_checkpointing(checkpointing)
    for block in model.blocks:
        block.attn.fused_attn = fused
    torch.manual_seed(3)
    logits = model(x)
    torch.manual_seed(3)
    found = [logits, model.forward_features(x)]
    found += gradients_of(found, model)
    for now, then in zip(found, wanted, strict=True):
        assert_close(now, then, roundings=2**10)


def test_class_and_register_tokens_stay():
    model = patch.apply(tiny("vit_small_plus_patch16_dinov3_qkvb"), r=3)
    tokens, size, plan = model.forward_merged(images())
    assert tokens.shape == (2, 5 + 16 - 9, 48)
    assert_identical(plan.assignment[:, :5], torch.arange(5).expand(2, 5))
    assert_identical(size.sum(1), torch.full((2,), 21.0))
    ordered, _, ordered_plan = model.forward_merged(images(), original_order=True)
    assert_identical(ordered_plan.unmerge(ordered), plan.unmerge(tokens))


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224"])
def test_padding_neither_merges_nor_is_attended_to(name: str):
    model, x = patch.apply(tiny(name), [2, 2, 0]), images()
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[0, 13:] = False
    tokens, size, plan = model.forward_merged(x, attn_mask=mask[:, None, None])
    changed = x.clone()
    changed[0, :, 48:] += 3.0  # the masked patches
    again = model.forward_merged(changed, attn_mask=mask)
    assert_close(again[0][plan.mask], tokens[plan.mask])
    assert_identical(size[0].sum(), torch.tensor(13.0))
    with pytest.raises(ValueError, match="attn_mask: expected a boolean mask of keys"):
        model(x, attn_mask=torch.ones(17, 17))


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224"])
def test_images_of_a_batch_merge_as_they_do_alone(name: str):
    """With a threshold they keep different numbers of tokens."""
    model, x = tiny(name), images()
    if model.pos_embed is not None:
        nn.init.zeros_(model.pos_embed)
    x[0, :, :, 16:] = 0  # twelve equal patches
    patch.apply(model, [8, 0, 2], threshold=0.5)
    size = model.forward_merged(x)[1]
    assert (size[0] > 0).sum() < (size[1] > 0).sum()
    for sample in range(2):
        assert_close(model(x)[sample : sample + 1], model(x[sample : sample + 1]), roundings=64)


def test_masks_and_causal_attention_work_as_before_while_nothing_merges():
    model, x = tiny(), images()
    mask = torch.ones(17, 17).tril().bool()
    wanted = model(x, attn_mask=mask), model(x, is_causal=True)
    patch.apply(model)
    assert_identical(model(x, attn_mask=mask), wanted[0])
    assert_identical(model(x, is_causal=True), wanted[1])
    model.r = 1
    with pytest.raises(ValueError, match="is_causal: expected False while tokens merge"):
        model(x, is_causal=True)


def test_rates_follow_the_patches_that_dropout_leaves():
    model, x = patch.apply(tiny("patches dropped"), keep_rate=0.75, layers=[1]), images()
    assert model.forward_merged(x)[0].shape[1] == 1 + 12
    assert model.train().forward_merged(x)[0].shape[1] == 1 + 9
    with pytest.raises(ValueError, match="guide: 'frequency' needs all patches of a grid"):
        patch.apply(model, r=1, guide="frequency")(x)


def test_what_the_guides_read():
    model, x = tiny("vit_small_patch16_rope_mixed_ape_224"), images()
    outputs = [patch.apply(model, [4, 2, 0], guide=guide)(x) for guide in (None, "spatial", "key_norm", "both")]
    assert len({output.sum().item() for output in outputs}) == 4


def test_hooks_of_blocks_see_tables_of_their_tokens():
    model, seen = patch.apply(tiny("vit_small_patch16_rope_mixed_224"), [3, 0, 2]), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args, named: seen.append(named["rope"].shape), with_kwargs=True)
    model(images())
    assert seen == [(3, 16, 32), (2, 3, 13, 32), (2, 3, 13, 32)]


def test_a_patched_model_is_copied_pickled_and_removed():
    model, x = tiny("vit_small_plus_patch16_dinov3_qkvb"), images()
    before, names, attributes = model(x), list(model.state_dict()), set(vars(model))
    kinds = [type(module) for module in model.modules()]
    patch.apply(model, r=3, guide="both")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_identical(other(x), model(x))
        other.r = 0
        assert model.r == 3
    assert list(model.state_dict()) == names
    patch.remove(model)
    assert [type(module) for module in model.modules()] == kinds
    assert set(vars(model)) == attributes
    assert_identical(model(x), before)


def test_settings_change_and_pruned_layers_merge_what_they_did():
    model, x = patch.apply(tiny(), keep_rate=0.5, layers=[0, 1]), images()
    assert model.r == [8, 4, 0]
    patch.set_merging(model, training_only=True)
    assert model.forward_merged(x)[0].shape[1] == 17
    assert model.train().forward_merged(x)[0].shape[1] == 5
    patch.apply(model.eval(), [4, 3, 1])
    wanted = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    model.prune_intermediate_layers([1])
    assert_identical(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], wanted)
    assert model.r == [4, 3]
    with pytest.raises(ValueError, match="output_fmt: expected 'NCHW' or 'NLC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_embedded_tokens_run_through_the_blocks():
    model, x = patch.apply(tiny(), 3, guide="both"), images()
    tokens, rope = model._pos_embed(model.patch_embed(x))
    tokens, size, plan = model.forward_blocks(model.norm_pre(tokens), rope=rope)
    wanted = model.forward_merged(x)
    assert_identical(model.norm(tokens), wanted[0])
    assert_identical(size, wanted[1])
    assert_identical(plan.assignment, wanted[2].assignment)
    with pytest.raises(ValueError, match=r"rope: expected the rotary positions .* model._pos_embed"):
        model.forward_blocks(tokens)


@pytest.mark.parametrize(
    ("name", "graph"),
    [
        ("eva02_tiny_patch14_224", "compile"),
        ("vit_small_patch16_rope_mixed_224", "compile, checkpointing"),
        ("vit_small_patch16_rope_mixed_224", "export"),
    ],
)
def test_graphs(name: str, graph: str):
    model, x = patch.apply(tiny(name, depth=2), r=3), images()
    if graph == "compile, checkpointing":
        model.train().set_grad_checkpointing()
    torch._dynamo.reset()
    with torch.set_grad_enabled(model.training):
        wanted = model(x)
        if graph == "export":
            found = torch.export.export(model, (x,)).module()(x)
        else:
            found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert_close(found, wanted, roundings=64)


@pytest.mark.parametrize("impl", list(CheckpointImpl))
def test_checkpoint_wrappers_recompute_what_was_computed(impl: CheckpointImpl):
    model, x = patch.apply(tiny("vit_small_patch16_rope_mixed_224").train(), 3, guide="spatial"), images()
    wanted = [model(x)]
    wanted += gradients_of(wanted, model)
    apply_activation_checkpointing(
        model,
        lambda block: checkpoint_wrapper(block, checkpoint_impl=impl),
        lambda module: isinstance(module, EvaBlock),
    )
    model(x).square().mean().backward()
    found = [model(x), torch.cat([p.grad.flatten() for n, p in model.named_parameters() if n != "rope.freqs"])]
    for now, then in zip([*found, model.rope.freqs.grad.flatten()], wanted, strict=True):
        assert_identical(now, then)


REGISTERED = [
    "eva02_tiny_patch14_224",
    "eva02_base_patch16_clip_224",
    "vit_base_patch16_rope_reg1_gap_256",
    "vit_pe_core_base_patch16_224",
    "vit_pe_spatial_tiny_patch16_512",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_base_patch16_dinov3",
    "vit_small_patch16_lingbot",
    "vit_base_patch16_sapiens2",
]


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_models_are_taken(name: str):
    """One of most families; all 65 names that timm 1.0.31 builds on ``Eva`` are."""
    with torch.device("meta"):
        model = timm.create_model(name)
    assert type(model) is Eva
    patch.apply(model, r=1)
    assert isinstance(model, MergingEva)


class OwnBlock(EvaBlock):
    def forward(self, x: Tensor, **named: Any) -> Tensor:
        return super().forward(x, **named) * 2


class OwnForward(Eva):
    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x


class NamedEva(Eva):
    """A model that overrides nothing."""


def with_block(block: nn.Module) -> nn.Module:
    model = tiny()
    model.blocks[1] = block
    return model


def with_attention(attention: nn.Module) -> nn.Module:
    model = tiny()
    model.blocks[2].attn = attention
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: timm.create_model("naflexvit_base_patch16_gap"), "got NaFlexVit, whose .* use_naflex=False"),
        (lambda: nn.Sequential(timm.create_model("naflexvit_base_patch16_gap")), "its 0 is timm's NaFlexVit, whose"),
        (lambda: OwnForward(**TINY), "got OwnForward, which has its own forward_features"),
        (lambda: with_block(Block(48, 3)), r"model.blocks\[1\]: expected a timm EvaBlock or .*, got Block"),
        (lambda: with_block(OwnBlock(48, 3)), r"model.blocks\[1\]: .*OwnBlock, which has its own forward"),
        (
            lambda: with_attention(nn.Identity()),
            r"model.blocks\[2\].attn: expected timm's EvaAttention .*, got Identity",
        ),
    ],
)
def test_what_is_not_handled_is_refused_by_name_and_left_as_it_was(model: Any, message: str):
    with torch.device("meta"):
        model = model()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=message):
        patch.apply(model, r=1)
    assert [type(module) for module in model.modules()] == kinds


def test_a_subclass_and_blocks_of_both_attentions_are_taken():
    torch.manual_seed(1)
    model, x = NamedEva(**TINY, patch_size=16, use_rot_pos_emb=True).eval(), images()
    model.blocks[1].attn = AttentionRope(48, 3)
    before = model(x)
    patch.apply(model, 2)
    assert isinstance(model, NamedEva)
    assert_identical(pickle.loads(pickle.dumps(model))(x), model(x))
    model.r = 0
    assert_identical(model(x), before)
    assert type(patch.remove(model)) is NamedEva
