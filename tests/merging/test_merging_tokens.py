"""Merging and unmerging with a plan: means, gradients, precision, tracing."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mlip_kernels._operator import use_reference
from mlip_kernels.merging import MergePlan, merge_plan, merge_tokens
from mlip_kernels.testing import (
    assert_as_accurate,
    assert_close,
    assert_identical,
    gradients,
)


def example(batch=3, tokens=14, channels=6, r=5, seed=0, masked=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64).to(dtype)
    size = torch.randint(1, 9, (batch, tokens), generator=generator).float()
    mask = torch.rand(batch, tokens, generator=generator) < 0.7 if masked else None
    return x, size, merge_plan(torch.randn(batch, tokens, 8, generator=generator), r, mask=mask)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(0, 12), st.integers(0, 3), st.booleans(), st.integers(0, 1000))
def test_sizes_are_conserved_and_unmerging_repeats_the_means(tokens, r, prefix_tokens, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 3, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 100_000, (2, tokens), generator=generator).float()
    mask = torch.rand(2, tokens, generator=generator) < 0.6 if masked else None
    prefix_tokens = min(prefix_tokens, tokens)
    merged, merged_size, plan = merge_tokens(x, x, r, size=size, prefix_tokens=prefix_tokens, mask=mask)

    real = torch.ones(2, tokens, dtype=torch.bool) if mask is None else mask
    assert torch.equal(merged_size.double().sum(1), (size.double() * real).sum(1))
    # The size-weighted sum over real tokens is conserved as well.
    total = (x * (size * real)[..., None]).sum(1)
    assert_close((merged * merged_size[..., None]).sum(1), total, roundings=64)
    # Every output token is in its own group, and the prefix stays in front.
    assert torch.equal(plan.assignment.gather(1, plan.kept), torch.arange(plan.merged_tokens).expand(2, -1))
    assert torch.equal(plan.kept[:, :prefix_tokens], torch.arange(prefix_tokens).expand(2, -1))

    spread = plan.unmerge(merged)
    for sample in range(2):
        for n in range(tokens):
            lost = plan.dropped is not None and plan.dropped[sample, n]
            assert_identical(spread[sample, n], merged[sample, plan.assignment[sample, n]] * (0 if lost else 1))
    again, _ = plan.merge(spread, size)
    assert_close(again, merged, roundings=16)


def test_sizes_default_to_those_of_the_plan_then_to_ones():
    x, size, _ = example()
    metric = torch.randn(3, 14, 8, generator=torch.Generator().manual_seed(1))
    sized, plain = merge_plan(metric, 5, size=size), merge_plan(metric, 5)
    assert_identical(sized.merge(x)[0], plain.merge(x, size)[0])
    assert_identical(sized.merge(x)[1], plain.merge(x, size)[1])
    assert_identical(plain.merge(x)[0], sized.merge(x, torch.ones(3, 14))[0])
    for dtype in (torch.int64, torch.int32, torch.float64, torch.bfloat16):
        assert_identical(plain.merge(x, size.to(dtype))[0], plain.merge(x, size)[0])
    assert sized.merge(x.bfloat16())[1].dtype == torch.float32


def test_tokens_that_nothing_merges_into_are_copied_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x, size, plan = example(masked=False, dtype=dtype)
        alone = torch.zeros_like(plan.kept).scatter_add_(1, plan.assignment, torch.ones_like(plan.assignment)) == 1
        start = x.gather(1, plan.kept[..., None].expand(-1, -1, x.shape[2]))
        assert alone.any()
        assert not alone.all()
        assert_identical(plan.merge(x, size)[0][alone], start[alone])


def test_an_output_token_of_size_zero_keeps_the_row_it_starts_from():
    x, _, plan = example(masked=False)
    merged, size = plan.merge(x, torch.zeros(3, 14))
    assert_identical(merged, x.gather(1, plan.kept[..., None].expand(-1, -1, 6)))
    assert_identical(size, torch.zeros(3, 9))


def plain_torch(x, size, plan):
    """The usual way: multiply by the sizes, add, divide, all in the dtype of x."""
    index = plan.assignment[..., None].expand(x.shape)
    weighted = x * size[..., None].to(x.dtype)
    total = torch.zeros(x.shape[0], plan.merged_tokens, x.shape[2], dtype=x.dtype).scatter_add(1, index, weighted)
    counts = torch.zeros(plan.kept.shape, dtype=x.dtype).scatter_add(1, plan.assignment, size.to(x.dtype))
    return total / counts[..., None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_plain_torch_in_values_and_gradients(dtype):
    x, size, plan = example(4, 50, 32, 20, masked=False, dtype=dtype)
    truth = plain_torch(x.double(), size, plan)
    assert_as_accurate(plan.merge(x, size)[0], plain_torch(x, size, plan), truth)
    mine, plain, exact = (
        gradients(lambda t, f=f: f(t), [t])[0]
        for f, t in (
            (lambda t: plan.merge(t, size)[0], x),
            (lambda t: plain_torch(t, size, plan), x),
            (lambda t: plain_torch(t, size, plan), x.double()),
        )
    )
    assert_as_accurate(mine, plain, exact)
    y = torch.randn(4, 30, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    index = plan.assignment[..., None].expand(x.shape)
    mine, plain, exact = (
        gradients(f, [t])[0]
        for f, t in ((plan.unmerge, y), (lambda t: t.gather(1, index), y), (lambda t: t.gather(1, index), y.double()))
    )
    assert_as_accurate(mine, plain, exact)


def test_large_counts_survive_half_precision():
    x = torch.tensor([[[1.0], [3.0], [1.0], [3.0]]], dtype=torch.float16)
    size = torch.tensor([[1.0, 3.0, 200_000.0, 600_000.0]])
    merged, merged_size, _ = merge_tokens(x, torch.ones(1, 4, 1), 2, size=size, prefix_tokens=0)
    assert merged_size.tolist() == [[200_004.0, 600_000.0]]
    assert_close(merged[0, 0], torch.tensor([(1 + 9 + 200_000) / 200_004]).double(), roundings=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_group_of_many_tokens_stays_within_one_rounding_in_half_precision(dtype):
    generator = torch.Generator().manual_seed(7)
    x = (1 + torch.rand(1, 400, 5, generator=generator)).to(dtype)
    merged, _, plan = merge_tokens(x, torch.ones(1, 400, 1), 200, prefix_tokens=0)
    group = plan.assignment[0] == 0
    assert group.sum() == 201
    assert_close(merged[0, 0], x[0, group].double().mean(0), roundings=1)
    grad = gradients(plan.unmerge, [merged])[0]
    cotangent = gradients(lambda t: t, [x])[0]
    assert_close(grad[0, 0], cotangent[0, group].double().sum(0), roundings=1)


@pytest.mark.parametrize("masked", [False, True])
def test_the_fast_gradient_is_that_of_autograd_through_the_reference(masked):
    x, size, plan = example(masked=masked)
    for function, leaf in ((lambda t: plan.merge(t, size)[0], x), (plan.unmerge, torch.randn(3, 9, 4))):
        fast, fast_grad = function(leaf), gradients(function, [leaf])[0]
        with use_reference():
            assert_identical(fast, function(leaf))
            assert_close(fast_grad, gradients(function, [leaf])[0])


def test_masked_tokens_get_no_gradient_from_real_ones():
    x, size, plan = example()
    x.requires_grad_()
    plan.merge(x, size)[0][plan.mask].sum().backward()
    real = torch.zeros(3, 14, dtype=torch.bool).scatter_(1, plan.kept, plan.mask)
    merged_away = torch.ones_like(real).scatter_(1, plan.kept, False) & ~plan.dropped
    assert (x.grad.abs().sum(-1) > 0).equal(real | merged_away)


def test_metric_guide_and_sizes_get_no_gradient():
    metric, guide = torch.randn(2, 9, 4, requires_grad=True), torch.rand(2, 9, requires_grad=True)
    x = torch.randn(2, 9, 4, requires_grad=True)
    merged, size, plan = merge_tokens(x, metric, 3, guide=guide)
    merged.sum().backward()
    assert x.grad is not None
    assert metric.grad is None
    assert guide.grad is None
    assert not any(t.requires_grad for t in (size, plan.assignment, plan.kept, plan.removed))


def test_origins_follow_tokens_through_two_merges():
    tokens = 17
    membership = torch.eye(tokens).expand(3, tokens, tokens)
    generator = torch.Generator().manual_seed(5)
    y, size, first = merge_tokens(membership, torch.randn(3, tokens, 4, generator=generator), 6)
    z, size, second = merge_tokens(y, torch.randn(3, 11, 4, generator=generator), 4, size=size)
    origin = second.track(first.track())
    assert origin.shape == (3, tokens)
    members = torch.nn.functional.one_hot(origin, second.merged_tokens).transpose(1, 2)
    assert_identical(z > 0, members > 0)
    assert_identical(size, members.sum(2).float())
    # A guide on the original positions, merged along, is the mean over each token's positions.
    guide = torch.rand(3, tokens, 1, generator=generator)
    along, _ = second.merge(*first.merge(guide))
    assert_close(along, (members.double() @ guide.double()) / members.sum(2, keepdim=True))
    for wrong, error in ((origin.int(), TypeError), (origin[:2], ValueError), (origin[0], ValueError)):
        with pytest.raises(error, match=r"^origin"):
            second.track(wrong)


def test_chained_merges_with_masks_equal_merging_the_real_tokens_alone():
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(1, 20, 5, generator=generator)
    mask = (torch.arange(20) < 13)[None]
    y, size, plan = merge_tokens(x, x, 4, mask=mask)
    y, size, plan = merge_tokens(y, y, 3, size=size, mask=plan.mask)
    alone, alone_size, _ = merge_tokens(x[:, :13], x[:, :13], 4)
    alone, alone_size, _ = merge_tokens(alone, alone, 3, size=alone_size)
    assert_identical(y[plan.mask], alone[0])
    assert_identical(size[plan.mask], alone_size[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.lists(st.integers(0, 6), min_size=2, max_size=4), st.booleans(), st.integers(0, 1000))
def test_plans_one_after_the_other_are_one_plan(tokens, steps, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 3, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, tokens, generator=generator) < 0.6 if masked else None
    size = torch.randint(1, 50, (2, tokens), generator=generator).float()
    whole, plans, merged, merged_size = None, [], x, size
    for r in steps:
        plan = merge_plan(merged, r, size=merged_size, mask=mask)
        merged, merged_size = plan.merge(merged)
        mask = plan.mask
        whole = plan if whole is None else whole.then(plan)
        plans.append(plan)
    at_once, size_at_once = whole.merge(x, size)
    real = merged_size > 0
    assert_identical(size_at_once, merged_size)
    assert_close(at_once[real], merged[real], roundings=64)
    assert torch.equal(torch.cat((whole.kept, whole.removed), 1).sort(1).values, torch.arange(tokens).expand(2, -1))
    spread = merged
    for plan in reversed(plans):
        spread = plan.unmerge(spread)
    assert_identical(whole.unmerge(merged), spread)


def forward(x, metric, guide, r):
    merged, size, plan = merge_tokens(x, metric, r, guide=guide)
    positions, _ = plan.merge(metric, torch.ones(metric.shape[:2]))
    return merged, size, plan.unmerge(merged * 2), positions, plan.track(), plan


def test_compiles_as_one_graph_with_gradients_and_returns_the_plan():
    x, metric, guide = torch.randn(2, 11, 4), torch.randn(2, 11, 3), torch.rand(2, 11)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for r in (3, 4):
        *expected, plan = forward(x, metric, guide, r)
        *found, compiled_plan = compiled(x, metric, guide, r)
        for one, two in zip(found, expected, strict=True):
            assert_identical(one, two)
        assert_identical(compiled_plan.kept, plan.kept)
        mine, theirs = (gradients(lambda t, f=f: f(t, metric, guide, 3)[:3], [x])[0] for f in (compiled, forward))
        assert_identical(mine, theirs)
    taking = torch.compile(lambda p, t: p.merge(t)[0], fullgraph=True, backend="aot_eager")
    assert_identical(taking(plan, x), plan.merge(x)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_under_activation_checkpointing_merges_the_same(reentrant):
    linear = torch.nn.Linear(4, 4)

    def block(t):
        return merge_tokens(t, linear(t), 4)[0].square()

    x = torch.randn(2, 15, 4)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    checkpoint(block, first, use_reentrant=reentrant).sum().backward()
    block(second).sum().backward()
    assert_identical(first.grad, second.grad)


def test_a_plan_survives_pickling():
    x, size, plan = example()
    again = pickle.loads(pickle.dumps(plan))
    assert_identical(again.merge(x, size)[0], plan.merge(x, size)[0])
    assert again.prefix_tokens == plan.prefix_tokens


@pytest.mark.parametrize("byte", [2, 254, 255])
def test_any_byte_but_0_of_the_masks_of_a_plan_is_true_when_another_follows(byte):
    x, _, plan = example()
    odd = {name: (getattr(plan, name).to(torch.uint8) * byte).view(torch.bool) for name in ("mask", "dropped")}
    odd = MergePlan(plan.assignment, plan.kept, plan.removed, plan.prefix_tokens, **odd)
    following = merge_plan(plan.merge(x)[0], 2)
    assert_identical(odd.then(following).merge(x)[0], plan.then(following).merge(x)[0])
