"""ToMe's names and ToMe's order of tokens, against its published rule written as loops."""

import pytest
import timm
import torch
from torch import Tensor

from mlip_kernels.patch import tome
from mlip_kernels.testing import assert_close, assert_identical, gradients

MODES = {"sum": sum, "mean": lambda rows: sum(rows) / len(rows), "amax": lambda rows: torch.stack(rows).amax(0)}


def example(tokens: int = 13, channels: int = 5, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    metric = torch.randn(batch, tokens, 4, generator=generator)
    return metric, torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64)


def groups_of(metric: Tensor, r: int, class_token: bool, distill_token: bool) -> list[list[int]]:
    """The published rule for one sample: the input tokens of every output token, the one it starts from first."""
    unit = metric.double() / metric.double().norm(dim=-1, keepdim=True)
    r = min(r, (len(metric) - class_token - distill_token) // 2)
    if r == 0:
        return [[token] for token in range(len(metric))]
    even, odd = list(range(0, len(metric), 2)), list(range(1, len(metric), 2))
    proposals = []
    for source in even:
        scores = [
            (float(unit[source] @ unit[target]), -target) for target in odd if not (distill_token and target == 1)
        ]
        if not (class_token and source == 0):
            score, target = max(scores)
            proposals.append((-score, source, -target))
    proposals.sort()
    merged = proposals[:r]
    left = [source for _, source, _ in proposals[len(merged) :]]
    if class_token:
        left = [0, *sorted(left)]
    into = {target: [target, *sorted(s for _, s, t in merged if t == target)] for target in odd}
    if distill_token:
        return [[0], [1], *([s] for s in left[1:]), *(into[t] for t in odd[1:])]
    return [*([s] for s in left), *(into[t] for t in odd)]


@pytest.mark.parametrize(("class_token", "distill_token"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("r", [0, 1, 4, 100])
@pytest.mark.parametrize("tokens", [2, 7, 12, 13])
@pytest.mark.parametrize("mode", MODES)
def test_matching_merges_what_tome_merges_in_its_order(tokens, r, class_token, distill_token, mode):
    metric, x = example(tokens)
    merge, unmerge = tome.bipartite_soft_matching(metric, r, class_token, distill_token)
    y = merge(x, mode=mode)
    spread = unmerge(y)
    for sample in range(len(x)):
        groups = groups_of(metric[sample], r, class_token, distill_token)
        wanted = torch.stack([MODES[mode]([x[sample, n] for n in group]) for group in groups])
        assert_close(y[sample], wanted)
        for output, group in enumerate(groups):
            for token in group:
                assert_identical(spread[sample, token], y[sample, output])


@pytest.mark.parametrize(("tokens", "k"), [(12, 3), (13, 4), (7, 2), (5, 1)])
def test_every_kth_token_takes_the_others(tokens, k):
    metric, x = example(tokens)
    merge, unmerge = tome.kth_bipartite_soft_matching(metric, k)
    if k == 1:
        assert merge(x) is x
        return
    used = tokens // k * k
    targets = list(range(k - 1, used, k))
    unit = metric.double() / metric.double().norm(dim=-1, keepdim=True)
    y, spread = merge(x, mode="sum"), unmerge(merge(x))
    assert y.shape == (3, len(targets), 5)
    assert spread.shape == x.shape
    assert_identical(spread[:, used:], torch.zeros_like(spread[:, used:]))
    for sample in range(3):
        wanted = x[sample, targets].clone()
        for token in set(range(used)) - set(targets):
            wanted[int((unit[sample, targets] @ unit[sample, token]).argmax())] += x[sample, token]
        assert_close(y[sample], wanted)


def test_random_tokens_merge_into_their_most_similar():
    metric, x = example(12)
    torch.manual_seed(0)
    merge, _ = tome.random_bipartite_soft_matching(metric, 5)
    plan = merge.plan
    assert merge(x).shape == (3, 7, 5)
    assert_close(merge(x, mode="sum").sum(1), x.sum(1))
    unit = metric.double() / metric.double().norm(dim=-1, keepdim=True)
    for sample in range(3):
        for token in plan.removed[sample]:
            target = plan.kept[sample, (unit[sample, plan.kept[sample]] @ unit[sample, token]).argmax()]
            assert plan.assignment[sample, token] == plan.assignment[sample, target]
    assert not torch.equal(plan.removed[0], plan.removed[1])
    torch.manual_seed(1)
    assert not torch.equal(tome.random_bipartite_soft_matching(metric, 5)[0].plan.removed, plan.removed)


def test_weighted_means_carry_sizes():
    metric, x = example(12)
    merge, _ = tome.bipartite_soft_matching(metric, 4, class_token=True)
    y, size = tome.merge_wavg(merge, x)
    z, both = tome.merge_wavg(tome.bipartite_soft_matching(y, 2, class_token=True)[0], y, size)
    assert size.shape == (3, 8, 1)
    assert_close((z * both).sum(1), x.sum(1))
    assert_identical(both.sum(1), torch.full((3, 1), 12.0))
    plain, plain_size = tome.merge_wavg(lambda t, mode: merge(t, mode=mode), x)
    assert_close(plain, y)
    assert_identical(plain_size, size)
    one, other = (gradients(lambda t, m=m: tome.merge_wavg(m, t)[0], [x]) for m in (merge, merge.__call__))
    assert_close(one[0], other[0])


def test_sources_are_traced():
    metric, x = example(12)
    merge, unmerge = tome.bipartite_soft_matching(metric, 4)
    source = tome.merge_source(merge, x)
    again = tome.merge_source(tome.bipartite_soft_matching(merge(x), 2)[0], merge(x), source)
    assert_identical(source.sum(1), torch.ones(3, 12))
    assert again.shape == (3, 6, 12)
    assert_identical(again.sum(1), torch.ones(3, 12))
    assert_close(unmerge(merge(x)), source.transpose(1, 2).double() @ merge(x))


def test_rates_are_parsed():
    assert tome.parse_r(4, 3) == [3, 3, 3, 3]
    assert tome.utils.parse_r(4, (4, -1.0)) == [8, 5, 2, 0]
    assert tome.parse_r(3, [5]) == [5, 0, 0]


def test_a_model_is_patched_by_tomes_names():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    x = torch.randn(1, 3, 64, 64)
    tome.patch.timm(model)
    model.r = 3
    assert model.forward_merged(x)[0].shape[1] == 17 - 6
    tome.patch.timm(model, prop_attn=False)
    assert model.r == 0
    with pytest.raises(ValueError, match="trace_source: expected False"):
        tome.patch.timm(model, trace_source=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: tome.bipartite_soft_matching(m, 2, distill_token=True), ValueError, "distill_token: expected"),
        (lambda m: tome.bipartite_soft_matching(m, 2.0), TypeError, "r: "),
        (lambda m: tome.bipartite_soft_matching(m[0], 2), ValueError, "metric: "),
        (lambda m: tome.kth_bipartite_soft_matching(m, -1), ValueError, "k: "),
        (lambda m: tome.kth_bipartite_soft_matching(m, 14), ValueError, "k: expected at most the 13 tokens"),
        (lambda m: tome.random_bipartite_soft_matching(m, 13), ValueError, "r: "),
        (lambda m: tome.bipartite_soft_matching(m, 2)[0](m, mode="median"), ValueError, "mode: expected one of"),
    ],
)
def test_a_wrong_argument_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(example()[0])
