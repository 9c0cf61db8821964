"""What `apply` finds and refuses, and how its settings are read, changed and taken back."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from timm.models._features import FeatureGetterNet
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from tiny_vit import TINY, images, tiny
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from mlip_kernels.models import ImageConfig, MergingConfig
from mlip_kernels.models.image_tower import ImageTower
from mlip_kernels.patch import timm as patch
from mlip_kernels.testing import assert_close, assert_identical


class Renamed(VisionTransformer):
    """What users add to timm's."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.note = "kept"

    def embed(self, x: Tensor) -> Tensor:
        return self.forward_features(x)[:, 0]


class OwnHead(VisionTransformer):
    """A head that reads patches, although the pooling names the class token."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(x) + x[:, 1:].mean(1) @ self.head.weight.T


class OwnForward(VisionTransformer):
    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.blocks(self._pos_embed(self.patch_embed(x)))


class OwnBlock(Block):
    def forward(self, x: Tensor, **named: Any) -> Tensor:
        return super().forward(x) * 2


class NamedBlock(Block):
    """A block that overrides nothing."""


class NamedDistilled(VisionTransformerDistilled):
    """A model that overrides nothing."""


def built(kind: type[nn.Module], **changed: Any) -> nn.Module:
    torch.manual_seed(1)
    return kind(**(TINY | {"patch_size": 16} | changed)).eval()


@pytest.mark.parametrize("kind", [Renamed, NamedDistilled, OwnHead])
def test_a_subclass_that_leaves_the_forward_alone_is_patched(kind: type[nn.Module]):
    model, x = built(kind, block_fn=NamedBlock), images()
    before = model(x)
    assert_identical(patch.apply(model)(x), before)
    patch.apply(model, 3)
    assert isinstance(model, kind)
    assert isinstance(model.blocks[0], NamedBlock)
    tokens, _, plan = model.forward_merged(x)
    assert tokens.shape[1] == model.num_prefix_tokens + 16 - 9
    if kind is Renamed:
        assert model.note == "kept"
        assert_identical(model.embed(x), model.forward_features(x)[:, 0])
    if kind is OwnHead:
        assert_identical(model(x), model.forward_head(plan.unmerge(tokens)))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert type(other.blocks[0]) is type(model.blocks[0])
        assert_identical(other(x), model(x))
    patch.remove(model)
    assert type(model) is kind
    assert {type(block) for block in model.blocks} == {NamedBlock}
    assert_identical(model(x), before)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: built(OwnForward),
            "model: expected a timm VisionTransformer .*OwnForward, .* its own forward_features",
        ),
        (lambda: built(Renamed, block_fn=OwnBlock), r"model.blocks\[0\]: expected .*OwnBlock, .* its own forward"),
    ],
)
def test_a_subclass_with_a_forward_of_its_own_is_refused(model: Any, message: str):
    with pytest.raises(TypeError, match=message):
        patch.apply(model(), 3)


def in_open_clip(inner: nn.Module) -> nn.Module:
    timm_model = pytest.importorskip("open_clip.timm_model")
    outer = timm_model.TimmModel("vit_tiny_patch16_224", 7, image_size=64, pool="", proj="", pretrained=False)
    outer.trunk = inner
    return outer


OUTER = {
    "sequence": lambda inner: nn.Sequential(nn.Identity(), inner, nn.LayerNorm(7)),
    "compiled": lambda inner: torch.compile(inner, backend="eager"),
    "data parallel": DataParallel,
    "open_clip": in_open_clip,
}


@pytest.mark.parametrize("outer", OUTER)
def test_the_transformer_inside_is_patched(outer: str):
    inner, x = tiny(depth=1), images()
    model = OUTER[outer](inner)
    before, wanted = model(x), OUTER[outer](patch.apply(tiny(depth=1), 3, guide="spatial"))(x)
    assert patch.apply(model, 3, guide="spatial") is model
    assert patch.transformer(model) is inner
    assert inner.forward_merged(x)[0].shape[1] == 14
    assert_identical(model(x), wanted)
    assert patch.set_merging(model, r=0) is model
    assert_identical(model(x), before)
    assert patch.remove(model) is model
    assert type(inner) is VisionTransformer
    assert_identical(model(x), before)


def test_of_several_transformers_one_has_to_be_given():
    pair = nn.ModuleDict({"student": tiny(), "teacher": tiny()})
    with pytest.raises(ValueError, match=r"ModuleDict with 2 of them; give one of model.student, model.teacher"):
        patch.apply(pair, 3)
    patch.apply(pair["student"], 3)
    patch.remove(pair)
    assert type(pair["student"]) is VisionTransformer


def test_a_model_without_a_transformer_of_timm_says_what_it_has():
    clip = pytest.importorskip("open_clip.transformer")
    outer = nn.Module()
    outer.visual = clip.VisionTransformer(64, 16, 48, 1, 3, 4.0, output_dim=7)
    message = "got Module; its visual is the VisionTransformer of open_clip, which this patch does not know"
    for call in (patch.apply, patch.remove, patch.set_merging):
        with pytest.raises(TypeError, match=message):
            call(outer)
    with pytest.raises(TypeError, match=r"model: expected a timm VisionTransformer .*got Linear"):
        patch.remove(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model: expected a patched model, got VisionTransformer; call apply first"):
        patch.set_merging(tiny(), r=2)


def test_a_model_that_merges_by_itself_is_not_patched_inside():
    config = ImageConfig(image_size=32, patch_size=8, width=32, depth=1, heads=2)
    with pytest.raises(ValueError, match="model: expected one that does not merge yet, but ImageTower merges"):
        patch.apply(ImageTower(config, MergingConfig()), 2)


@pytest.mark.parametrize(
    ("settings", "merged"),
    [
        ({"r": [5, 0, 2]}, [5, 0]),
        ({"r": (3, -1.0)}, [6, 3]),
        ({"keep_rate": 0.75, "layers": (1, 2)}, [0, 4]),
        ({"keep_rate": 0.5, "layers": (0, 2), "overall": True}, [4, 0]),
    ],
)
def test_a_pruned_model_merges_what_it_merged_in_the_blocks_that_are_left(settings: dict[str, Any], merged: list[int]):
    model, x = patch.apply(tiny(), **settings), images()
    wanted = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    model.prune_intermediate_layers([1])
    assert len(model.blocks) == 2
    assert_identical(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], wanted)
    assert model.forward_merged(x)[0].shape[1] == 17 - sum(merged)
    patch.set_merging(model, guide="spatial")
    assert model.forward_merged(x)[0].shape[1] == 17 - sum(merged)
    patch.apply(model, 1)
    assert model.forward_merged(x)[0].shape[1] == 15


def test_r_is_readable_however_it_was_set():
    model = patch.apply(tiny(), keep_rate=0.5, layers=[1])
    assert model.r == [0, 8, 0]
    model.r = (3, -1.0)
    assert model.r == (3, -1.0)
    model.r = [4, 0, 1]
    model.prune_intermediate_layers([1])
    assert model.r == [4, 0]


def test_settings_change_one_by_one():
    model = patch.apply(tiny(), 4, guide="spatial", guide_weight=0.5, max_merges=2)
    model.set_merging(guide="both")
    assert (model.r, model.merging.guide_weight, model.merging.max_merges) == (4, 0.5, 2)
    assert model.merging.energy_cutoff == 0.5
    model.set_merging(keep_rate=0.5, layers=[1])
    assert model.r == [0, 8, 0]
    model.set_merging(r=2)
    assert (model.r, model.merging.keep_rate, model.merging.layers) == (2, None, None)
    with pytest.raises(ValueError, match=r"max_merges: .*0"):
        model.set_merging(max_merges=0)
    with pytest.raises(TypeError, match=r"training: expected one of the settings .*training_only"):
        model.set_merging(training=True)
    assert model.r == 2


def test_a_model_may_merge_in_training_only():
    model, x = tiny(), images()
    plain = model(x)
    patch.apply(model, 3, training_only=True)
    assert_identical(model(x), plain)
    assert model.forward_merged(x)[2] is None
    assert model.train().forward_merged(x)[0].shape[1] == 17 - 9
    model.set_merging(training_only=False)
    assert model.eval().forward_merged(x)[0].shape[1] == 17 - 9


def test_a_threshold_keeps_what_is_not_alike():
    model, x = tiny(), images()
    with torch.no_grad():
        model.pos_embed.zero_()
    x[0, :, :, 16:] = 0  # twelve equal patches
    wanted = model.forward_features(x)
    patch.apply(model, [8, 0, 0], threshold=0.9999)
    tokens, size, plan = model.forward_merged(x)
    real = (size > 0).sum(1).tolist()
    assert real[0] < real[1] == tokens.shape[1]
    assert_identical(plan.mask, size > 0)
    assert_identical(size.sum(1), torch.full((2,), 17.0))
    for sample in range(2):
        assert_close(model(x)[sample : sample + 1], model(x[sample : sample + 1]), roundings=64)
    assert model.forward_features(x).shape == wanted.shape


def test_tokens_come_in_the_order_of_the_image_if_asked_for():
    model, x = patch.apply(tiny(), 3), images()
    tokens, size, plan = model.forward_merged(x, original_order=True)
    merged, merged_size, first_plan = model.forward_merged(x)
    assert_identical(plan.positions, first_plan.positions.sort(1).values)
    assert_identical(plan.unmerge(tokens), first_plan.unmerge(merged))
    assert_identical(plan.unmerge(size[..., None]), first_plan.unmerge(merged_size[..., None]))


def test_embedded_tokens_run_through_the_blocks():
    model, x = patch.apply(tiny(), 3, guide="both"), images()
    embedded = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    tokens, size, plan = model.forward_blocks(embedded)
    wanted = model.forward_merged(x)
    assert_identical(model.norm(tokens), wanted[0])
    assert_identical(size, wanted[1])
    assert_identical(plan.assignment, wanted[2].assignment)
    for found, expected in zip(model(x, merged=True)[:2], wanted[:2], strict=True):
        assert_identical(found, expected)
    plain = embedded
    for block in model.blocks:
        plain = block(plain)
    assert plain.shape == embedded.shape
    with pytest.raises(ValueError, match="guide: 'frequency' needs all patches of a grid"):
        model.forward_blocks(embedded[:, :-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": [5]}, "r: got 1 entries for 3 blocks, so the last 2 merge nothing; give 3 entries"),
        ({"r": 500}, "r: of 16 patch tokens, 2 are left behind the last of 3 blocks"),
        ({"r": [8, 4, 2]}, "r: of 16 patch tokens, 2 are left"),
    ],
)
def test_a_schedule_that_is_hardly_meant_is_warned_of(settings: dict[str, Any], message: str):
    with pytest.warns(UserWarning, match=message):
        model = patch.apply(tiny(), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_merging(guide="spatial")
        patch.apply(model, [3, 0, 3])
        model.r = 4
    with pytest.warns(UserWarning, match=message):
        model.r = settings["r"]


def test_a_mask_of_keys_is_taken_in_every_form_that_is_unambiguous():
    model, x = patch.apply(tiny(), [2, 2, 0]), images()
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[0, 13:] = False
    wanted = model(x, attn_mask=mask)
    for form in (mask[:, None, None], mask.long(), mask.to(torch.uint8)[:, None, None] * 2):
        assert_identical(model(x, attn_mask=form), wanted)
    many, square = images(17), torch.ones(17, 17, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"attn_mask: expected \[B, 1, 1, N\] where .* 17: a mask \[17, 17\]"):
        model(many, attn_mask=square)
    assert model(many, attn_mask=square[:, None, None]).shape == (17, 7)
    with pytest.raises(ValueError, match="attn_mask: expected a boolean mask of keys"):
        model(x, attn_mask=mask.float())


@pytest.mark.parametrize("settings", [{"r": 3, "guide": "frequency"}, {"r": 3, "guide": "both"}, {"keep_rate": 0.7}])
@pytest.mark.filterwarnings("ignore")
def test_traced_models_take_other_batches(settings: dict[str, Any]):
    model = patch.apply(tiny(), **settings)
    with torch.no_grad():
        model(images())  # constants are made in eager mode
        traced = torch.jit.trace(model, images(1))
        assert_identical(traced(images(3)), model(images(3)))


def test_timms_feature_extractor_prunes_a_patched_model():
    getter = FeatureGetterNet(patch.apply(tiny(), [4, 0, 3]), out_indices=[0, 1])
    assert [f.shape for f in getter(images())] == [(2, 48, 4, 4)] * 2
