"""Blocks that merge: one implementation for the model's image tower and for patched models of timm."""

import dataclasses
import weakref

import pytest
import torch

from mlip_kernels.models import ImageConfig, MergingConfig
from mlip_kernels.models.image_tower import Companion, ImageTower
from mlip_kernels.nn.guidance import key_norm
from mlip_kernels.nn.merging_blocks import MergeState, last_state, merging_states
from mlip_kernels.patch import timm as patch
from mlip_kernels.testing import assert_identical

SIZES = ImageConfig(image_size=48, patch_size=8, width=32, depth=4, heads=2)


def tower(**merging) -> ImageTower:
    torch.manual_seed(0)
    return ImageTower(SIZES, MergingConfig(**merging)).eval()


@pytest.mark.parametrize("guide", ["none", "spatial"])
def test_the_image_tower_is_a_patched_model_of_timm(guide):
    model, x = tower(guide=guide), torch.randn(2, 3, 48, 48)
    patches = model.embed(x)
    mine = model(patches, Companion(None, None, None), [0, 7, 0, 5])
    patch.apply(model.trunk, [0, 7, 0, 5], guide=None if guide == "none" else guide)
    tokens, size, plan = model.trunk.forward_merged(x)
    assert_identical(mine.tokens, tokens[:, 1:])
    assert_identical(mine.feature, tokens[:, 0])
    assert_identical(mine.size, size[:, 1:])
    assert_identical(mine.origin, plan.assignment[:, 1:] - 1)


@torch.no_grad()
def test_tokens_of_earlier_blocks_are_let_go():
    model, earlier, lengths = tower(guide="none"), [], []
    for state in merging_states(model.trunk.blocks, MergeState(torch.randn(1, 37, 32)), [3, 0, 3, 0], model.rule):
        assert all(tokens() is None for tokens in earlier)
        earlier.append(weakref.ref(state.tokens))
        lengths.append(state.tokens.shape[1])
    assert lengths == [34, 34, 31, 31]


@pytest.mark.parametrize(("masked", "message"), [(False, "guide: expected one to sort"), (True, "mask: expected None")])
def test_shares_are_of_tokens_that_are_sorted_and_real(masked, message):
    model, tokens = tower(guide="none"), torch.randn(1, 37, 32)
    mask = torch.ones(1, 37, dtype=torch.bool) if masked else None
    rule = dataclasses.replace(model.rule, guide=key_norm if masked else None)
    with pytest.raises(ValueError, match=message):
        last_state(merging_states(model.trunk.blocks, MergeState(tokens, mask=mask), [(0.5, 0.3), 0, 0, 0], rule))
