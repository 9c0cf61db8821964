"""Pairs below a threshold stay apart, so samples merge different numbers of tokens; and plans in the input's order."""

import math
import pickle
import warnings

import pytest
import torch
from test_merge_plan import brute_force_pairs

from mlip_kernels import merge_plan, merge_tokens, use_reference
from mlip_kernels.testing import assert_close, assert_identical, gradients


def example(batch=5, tokens=21, masked=False):
    """Samples of falling similarity, the last of them orthogonal to itself, with masks of different lengths."""
    generator = torch.Generator().manual_seed(tokens)
    common = torch.linspace(3, 0, batch)[:, None, None]
    metric = torch.randn(batch, tokens, 6, generator=generator) + common
    mask = torch.arange(tokens) < torch.linspace(tokens, tokens // 2, batch).long()[:, None] if masked else None
    x = torch.randn(batch, tokens, 3, generator=generator)
    size = torch.randint(1, 4, (batch, tokens), generator=generator).float()
    return metric, x, size, mask


def pairs_above(metric, r, threshold, guide, mask, prefix_tokens):
    """The pairs of one sample by the rule as a loop: the r best by score, among those whose cosine is high enough."""
    unit = metric.double() / metric.double().norm(dim=-1, keepdim=True)
    cosine = (unit @ unit.T).float()
    tokens = len(metric)
    real = [n for n in range(prefix_tokens, tokens) if mask is None or mask[n]]
    best = {}
    for i in real:
        if i % 2 == 0:
            scored = [(-float(cosine[i, j]), j) for j in real if j % 2 == 1 and cosine[i, j] >= threshold]
            if scored:
                distance, j = min(scored)
                best[i] = (distance + (0.0 if guide is None else 0.7 * float(guide[i])), j)
    order = sorted(best, key=lambda i: (best[i][0], i))[: min(r, (tokens - prefix_tokens) // 2)]
    return {i: best[i][1] for i in order}


def merged_pairs(plan, sample):
    """Which token merges into which, from the maps of a plan."""
    dropped = set() if plan.dropped is None else set(plan.dropped[sample].nonzero().flatten().tolist())
    removed = [n for n in plan.removed[sample].tolist() if n not in dropped]
    return {n: int(plan.kept[sample, plan.assignment[sample, n]]) for n in removed}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_guide", [False, True])
@pytest.mark.parametrize("prefix_tokens", [0, 1, 2])
def test_pairs_below_the_threshold_stay_apart_and_shorter_samples_are_padded(prefix_tokens, with_guide, masked):
    metric, x, size, mask = example(masked=masked)
    guide = torch.rand(5, 21, generator=torch.Generator().manual_seed(3)) if with_guide else None
    for r, threshold in [(4, 0.5), (100, 0.5), (4, 0.9), (100, -1.0), (3, 1.0)]:
        options = {"guide": guide, "guide_weight": 0.7, "prefix_tokens": prefix_tokens, "threshold": threshold}
        merged, merged_size, plan = merge_tokens(x, metric, r, size=size, mask=mask, **options)
        spare = []
        for sample in range(5):
            own = (None if guide is None else guide[sample], None if mask is None else mask[sample])
            pairs = pairs_above(metric[sample], r, threshold, *own, prefix_tokens)
            assert merged_pairs(plan, sample) == pairs
            padding = 0 if mask is None else int((~mask[sample]).sum())
            spare.append(min(len(pairs) + padding, min(r, (21 - prefix_tokens) // 2)))
            real = merged_size[sample] > 0
            assert int(real.sum()) == 21 - padding - len(pairs)
            assert_identical(real, real.sort(descending=True, stable=True)[0])
            assert plan.mask is None or torch.equal(plan.mask[sample], real)
            counted = size[sample] if mask is None else size[sample] * mask[sample]
            assert_close((merged[sample] * merged_size[sample, :, None]).sum(0), (x[sample] * counted[:, None]).sum(0))
        assert plan.r == 21 - plan.merged_tokens == min(spare)
        assert plan.tokens == 21


@pytest.mark.parametrize("max_merges", [1, 2])
def test_a_threshold_and_a_limit_hold_together(max_merges):
    metric, *_ = example()
    plan = merge_plan(metric, 8, max_merges=max_merges, threshold=0.6)
    for sample in range(5):
        free = brute_force_pairs(metric[sample], 8, max_merges)
        unit = torch.nn.functional.normalize(metric[sample].double(), dim=-1)
        # Without a guide the pairs come in the order of their cosines, so those above the threshold are the first.
        assert merged_pairs(plan, sample) == {
            i: j for i, j in free.items() if float((unit[i] @ unit[j]).float()) >= 0.6
        }


@pytest.mark.parametrize("masked", [False, True])
def test_a_threshold_that_all_pairs_reach_changes_nothing(masked):
    metric, x, size, mask = example(masked=masked)
    with_threshold = merge_tokens(x, metric, 6, size=size, mask=mask, threshold=-1.0)
    free = merge_tokens(x, metric, 6, size=size, mask=mask)
    for one, other in zip(with_threshold[:2], free[:2], strict=True):
        assert_identical(one, other)
    for name in ("assignment", "kept", "removed", "mask", "dropped"):
        one, other = getattr(with_threshold[2], name), getattr(free[2], name)
        assert (one is None) == (other is None)
        if one is not None:
            assert_identical(one, other)
    assert with_threshold[2].padding == 0


def test_cosines_that_equal_the_threshold_merge_and_zero_vectors_have_cosine_zero():
    metric = torch.tensor([[[1.0, 0], [3, 0], [0, 1], [0, 0], [0.6, 0.8], [0, -2]]])
    for threshold, pairs in [(1.0, {0: 1}), (0.6, {0: 1, 4: 1}), (0.0, {0: 1, 2: 1, 4: 1}), (0.61, {0: 1})]:
        assert merged_pairs(merge_plan(metric, 3, prefix_tokens=0, threshold=threshold), 0) == pairs


def test_one_sample_needs_no_padding():
    metric, x, *_ = example(batch=1)
    merged, size, plan = merge_tokens(x, metric, 10, threshold=0.97)
    assert 0 < plan.r < 10
    assert plan.mask is None
    assert plan.padding == 0
    assert merged.shape[1] == size.shape[1] == 21 - plan.r


def test_rows_go_back_through_padding_with_gradients():
    metric, x, size, _ = example()
    x = x.double()
    merged, _, plan = merge_tokens(x, metric, 8, size=size, threshold=0.8)
    assert plan.padding > 0
    rows = plan.track()
    assert rows.shape == (5, 21)
    assert_identical(plan.unmerge(merged), merged.gather(1, rows[..., None].expand_as(x)))
    assert torch.autograd.gradcheck(lambda t: plan.merge(t)[0], x[:, :, :1].requires_grad_())
    assert torch.autograd.gradcheck(plan.unmerge, merged[:, :, :1].requires_grad_())
    with use_reference():
        again = merge_tokens(x, metric, 8, size=size, threshold=0.8)
        expected = gradients(lambda t: plan.merge(t)[0], [x])
    assert_identical(again[2].assignment, plan.assignment)
    assert_identical(again[0], merged)
    assert_close(gradients(lambda t: plan.merge(t)[0], [x])[0], expected[0])
    assert_identical(pickle.loads(pickle.dumps(plan)).merge(x)[0], plan.merge(x)[0])


@pytest.mark.parametrize("thresholds", [(0.8, None), (None, 0.8), (0.9, 0.6)])
def test_padded_plans_follow_each_other(thresholds):
    metric, x, size, _ = example()
    first, second = thresholds
    merged, merged_size, plan = merge_tokens(x, metric, 7, size=size, threshold=first)
    again, again_size, next_plan = merge_tokens(merged, merged, 4, size=merged_size, mask=plan.mask, threshold=second)
    whole = plan.then(next_plan)
    assert whole.tokens == 21
    assert whole.merged_tokens == again.shape[1]
    assert_identical(whole.track(), next_plan.track(plan.track()))
    once, once_size = whole.merge(x)
    assert_identical(once_size, again_size)
    real = again_size > 0
    assert_close(once[real], again[real], roundings=16)
    assert_identical(whole.unmerge(again), plan.unmerge(next_plan.unmerge(again)))


def test_graphs_keep_the_length_and_merge_the_same():
    metric, x, size, _ = example()

    def run(x, metric, size):
        merged, merged_size, plan = merge_tokens(x, metric, 8, size=size, threshold=0.8)
        return merged, merged_size, plan.unmerge(merged)

    merged, merged_size, spread = run(x, metric, size)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing says that it fixes sizes
        traced = torch.jit.trace(run, (x, metric, size), check_trace=False)
    for graph in (compiled, traced):
        found, found_size, found_spread = graph(x, metric, size)
        assert found.shape == x.shape
        assert_identical(found[:, : merged.shape[1]], merged)
        assert_identical(found_size[:, : merged.shape[1]], merged_size)
        assert not found_size[:, merged.shape[1] :].any()
        assert_identical(found_spread, spread)
    inputs = (torch.nn.functional.pad(metric, (0, 0, 0, 8)), 8, None, 1.0, 1)
    mask = torch.nn.functional.pad(torch.ones(5, 21, dtype=torch.bool), (0, 8))
    torch.library.opcheck(torch.ops.mlip_kernels.merging_match_above, (*inputs, mask, None, 0.8))


@pytest.mark.parametrize("options", [{}, {"threshold": 0.8}, {"masked": True}, {"masked": True, "threshold": 0.8}])
def test_the_original_order_is_that_of_the_input(options):
    metric, x, size, mask = example(masked=options.pop("masked", False))
    merged, merged_size, plan = merge_tokens(x, metric, 8, size=size, mask=mask, **options)
    sorted_plan, order = plan.in_original_order(), plan.original_order()
    again, again_size = sorted_plan.merge(x)
    assert_identical(again, merged.gather(1, order[..., None].expand_as(merged)))
    assert_identical(again_size, merged_size.gather(1, order))
    assert_identical(sorted_plan.unmerge(again), plan.unmerge(merged))
    positions = sorted_plan.positions
    assert 0 <= int(positions.min()) <= int(positions.max()) < 21
    for sample in range(5):
        real = again_size[sample] > 0
        assert_identical(real, real.sort(descending=True, stable=True)[0])
        rows = positions[sample, real].tolist()
        assert rows == sorted(plan.kept[sample, merged_size[sample] > 0].tolist())
        alone = [row for row, n in zip(rows, again_size[sample, real].tolist(), strict=True) if n == size[sample, row]]
        for row in alone:
            assert_identical(again[sample, rows.index(row)], x[sample, row])


def test_a_masked_prefix_token_keeps_its_place_in_any_order():
    metric = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, [0, 4]] = False
    plan = merge_plan(metric, 2, prefix_tokens=2, mask=mask).in_original_order()
    assert plan.positions[0, :2].tolist() == [0, 1]
    assert plan.mask[0].tolist() == [False] + [True] * 5 + [False]


@pytest.mark.parametrize(
    ("threshold", "error"), [(1.5, ValueError), (math.nan, ValueError), ("0.5", TypeError), (True, TypeError)]
)
def test_a_threshold_that_is_no_cosine_is_refused(threshold, error):
    with pytest.raises(error, match=r"^threshold: "):
        merge_plan(torch.randn(1, 9, 4), 2, threshold=threshold)
