"""The losses over gloo processes equal open_clip's on every rank and those of one process on the whole batch."""

import pytest
import torch
from loss_ranks import (
    EVEN,
    EXCHANGES,
    GATHERS,
    LOCAL,
    RAGGED,
    SWITCHES,
    Batch,
    loss_and_gradients,
    tower,
    with_frozen_texts,
)
from torch.nn.functional import cross_entropy

from mlip_kernels.contrastive import token_logits
from mlip_kernels.nn.losses import ClipLoss, SigLipLoss, TokenContrastiveLoss
from mlip_kernels.testing import assert_close, assert_identical

only_two = pytest.mark.parametrize("ranks", [2], indirect=True)


def mean_over_ranks(found):
    """Mean loss, then gradients as DDP averages them: rows of the batch stay with their rank, numbers are shared."""
    losses, *leaves = zip(*found, strict=True)
    gradients = [torch.cat(g) / len(g) if g[0].dim() else torch.stack(g).mean() for g in leaves]
    return [torch.stack(losses).mean(), *gradients]


def assert_all_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        # Added to 1, because the gradient of the bias of a softmax is 0 but for rounding.
        assert_close(one + 1, other + 1)


def single_process(loss, batch):
    return loss_and_gradients(loss, batch.inputs, batch.options)


@pytest.mark.parametrize("gather", GATHERS)
def test_token_loss_is_that_of_one_process(ranks, gather):
    expected = single_process(TokenContrastiveLoss(), Batch(*EVEN[len(ranks)]))
    assert_all_close(mean_over_ranks([r["token even", gather] for r in ranks]), expected)
    assert float(ranks[0]["token even", gather][0]) != float(ranks[1]["token even", gather][0])


@pytest.mark.parametrize("gather", GATHERS)
def test_token_loss_of_ragged_shards_is_that_of_one_process(ranks, gather):
    expected = single_process(TokenContrastiveLoss(label_smoothing=0.1), Batch(*RAGGED[len(ranks)]))
    assert_all_close(mean_over_ranks([r["token ragged", gather] for r in ranks]), expected)


@pytest.mark.parametrize("gather", GATHERS)
def test_token_loss_learns_from_texts_that_do_not(ranks, gather):
    expected = single_process(with_frozen_texts(TokenContrastiveLoss()), Batch(*RAGGED[len(ranks)]))
    assert_all_close(mean_over_ranks([r["token frozen", gather] for r in ranks]), expected)


@pytest.mark.parametrize("gather", GATHERS)
def test_token_loss_of_ragged_shards_without_masks_can_be_the_same_number_on_every_rank(ranks, gather):
    expected = single_process(TokenContrastiveLoss(), Batch(*RAGGED[len(ranks)], bare=True))
    found = [r["token bare", gather] for r in ranks]
    for one in found:
        assert_close(one[0], expected[0])
    assert_all_close(mean_over_ranks(found), expected)


@pytest.mark.parametrize("gather", GATHERS)
def test_token_loss_without_gathered_gradients_sees_only_what_its_rank_computed(ranks, gather):
    total = len(ranks) * LOCAL
    for rank, found in enumerate(ranks):
        rows = slice(rank * LOCAL, (rank + 1) * LOCAL)
        own = torch.zeros(total, dtype=torch.bool)
        own[rows] = True

        def constant_elsewhere(value, own=own):
            return torch.where(own.view(-1, *[1] * (value.dim() - 1)), value, value.detach())

        def expected(image, text, scale, bias, rows=rows, constant=constant_elsewhere, **options):
            options["text_weight"] = constant(options["text_weight"])
            per_image, per_text = token_logits(image, constant(text), scale=scale, bias=bias, **options)
            per_text = constant(per_text[rows].t()).t()
            labels = torch.arange(rows.start, rows.stop)
            return (cross_entropy(per_image[rows], labels) + cross_entropy(per_text, labels)) / 2

        value, *leaves = single_process(expected, Batch(*EVEN[len(ranks)]))
        assert_all_close(found["token without", gather], [value, *(g[rows] if g.dim() else g for g in leaves)])


def test_both_ways_to_gather_take_the_mixed_dtypes_of_autocast(ranks):
    for rank in ranks:
        for one, other in zip(rank["token half", "ring"], rank["token half", "all"], strict=True):
            assert one.dtype == other.dtype
            assert_close(one, other)


def test_the_ring_keeps_no_remote_shard_and_holds_one_at_a_time(ranks):
    for rank in ranks:
        ring, everything = rank["token kept", "ring"], rank["token kept", "all"]
        assert everything["saved"] > len(ranks) * ring["shard"]
        assert ring["saved"] < 1.5 * ring["shard"]
        assert ring["forward"] == min(1, len(ranks) - 2)
        assert ring["backward"] <= 2  # a shard and its gradient


def test_the_ring_computes_again_on_what_it_computed_first(ranks):
    for rank in ranks:
        assert rank["computed again"] == [True] * 2 * len(ranks)


@only_two
@pytest.mark.parametrize("gather", GATHERS)
def test_token_loss_under_ddp_has_the_gradients_of_one_process(ranks, gather):
    batch, model = Batch(*RAGGED[2]), tower()
    image, text, *ends = batch.inputs
    TokenContrastiveLoss()(*model(image, text), *ends, **batch.options).backward()
    for rank in ranks:
        assert_all_close(rank["ddp", gather], [p.grad for p in model.parameters()])


@pytest.mark.parametrize(("local", "grad", "cache"), SWITCHES)
def test_clip_loss_is_that_of_open_clip_on_every_rank(ranks, local, grad, cache):
    for rank in ranks:
        assert_all_close(rank["clip", local, grad, cache], rank["open_clip", local, grad, cache])


def test_clip_logits_of_a_local_loss_are_those_of_open_clip(ranks):
    # The loss cannot tell: a softmax does not see the bias.
    for rank in ranks:
        assert_all_close(rank["clip logits"], rank["open_clip logits"])


@pytest.mark.parametrize("local", [False, True])
def test_clip_loss_with_gathered_gradients_is_that_of_one_process(ranks, local):
    expected = single_process(ClipLoss(), Batch(*EVEN[len(ranks)], tokens=False))
    assert_all_close(mean_over_ranks([r["clip", local, True, False] for r in ranks]), expected)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_siglip_loss_is_that_of_open_clip_on_every_rank_and_of_one_process(ranks, exchange, cache):
    for rank in ranks:
        assert_all_close(rank["siglip", exchange, cache], rank["open_clip siglip", exchange])
    expected = single_process(SigLipLoss(), Batch(*EVEN[len(ranks)], tokens=False))
    assert_all_close(mean_over_ranks([r["siglip", exchange, cache] for r in ranks]), expected)


def test_gathered_gradients_of_half_precision_are_added_in_float32(ranks):
    for rank in ranks:
        gathered, gradient = rank["half"]
        assert_identical(gathered[:, 0], torch.arange(1.0, len(ranks) + 1).bfloat16())
        assert_identical(gradient, torch.full((1, len(ranks)), 1 + (len(ranks) - 1) / 256).bfloat16())


@only_two
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("batch", "local batch size: expected the same on every rank, got [3, 2] by rank"),
        ("empty batch on one rank", "local batch size: expected the same on every rank, got [3, 0] by rank"),
        ("no pair on any rank", "batch size: expected at least one pair"),
        ("token width", "token width D: expected the same on every rank, got [8, 9] by rank"),
        ("dtype", "bytes an element of text_tokens: expected the same on every rank, got [4, 2] by rank"),
        ("mask", "text_mask given: expected the same on every rank, got [0, 1] by rank"),
        ("learned texts", "text_tokens.requires_grad: expected the same on every rank, got [0, 1] by rank"),
        ("rank", "(those of the process group), got"),
    ],
)
def test_ranks_that_differ_are_told_so_everywhere(ranks, case, said):
    for rank in ranks:
        assert said in rank["mismatches"][case]
