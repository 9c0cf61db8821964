"""Which tokens merge: against a brute-force loop in float64, and against the published rule of ToMe."""

import math

import pytest
import torch

from mlip_kernels.merging import merge_plan, merge_tokens
from mlip_kernels.testing import TOKEN_SHAPES, assert_close, assert_identical


def cosine(a, b):
    norm = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
    return sum(v * w for v, w in zip(a, b, strict=True)) / norm if norm > 0 else 0.0


def brute_force(metric, r, *, guide=None, guide_weight=1.0, prefix_tokens=1, mask=None):
    """Members of every output token of one sample, the founding one first, and which outputs are real."""
    rows, tokens = metric.double().tolist(), metric.shape[0]
    real = [True] * tokens if mask is None else mask.tolist()
    r = min(r, (tokens - prefix_tokens) // 2)
    if r == 0:
        return [[n] for n in range(tokens)], real
    sources = [n for n in range(prefix_tokens, tokens) if n % 2 == 0 and real[n]]
    targets = [n for n in range(prefix_tokens, tokens) if n % 2 == 1 and real[n]]
    proposals = []
    for i in sources:
        scored = [(-round(cosine(rows[i], rows[j]), 9), j) for j in targets]
        if scored:
            distance, j = min(scored)
            penalty = 0.0 if guide is None else guide_weight * float(guide[i])
            proposals.append((distance + penalty, i, j))
    merged = {i: j for _, i, j in sorted(proposals)[:r]}
    padding = [n for n in range(prefix_tokens, tokens) if not real[n]]
    founders = [*range(prefix_tokens), *(i for i in sources if i not in merged), *targets, *padding][: tokens - r]
    groups = [[j, *(i for i in sorted(merged) if merged[i] == j)] for j in founders]
    return groups, [real[j] for j in founders]


def brute_force_pairs(metric, r, max_merges, *, guide=None, guide_weight=1.0, prefix_tokens=1, mask=None):
    """The pairs of one sample with a limit for each target: in the order of their scores, while there is room."""
    rows, tokens = metric.double().tolist(), metric.shape[0]
    real = [True] * tokens if mask is None else mask.tolist()
    free = [n for n in range(prefix_tokens, tokens) if real[n]]
    scored = sorted(
        (-round(cosine(rows[i], rows[j]), 9) + (0.0 if guide is None else guide_weight * float(guide[i])), i, j)
        for i in free
        for j in free
        if i % 2 == 0 and j % 2 == 1
    )
    merged = {}
    for _, i, j in scored:
        room = list(merged.values()).count(j) < max_merges
        if i not in merged and room and len(merged) < min(r, (tokens - prefix_tokens) // 2):
            merged[i] = j
    return merged


def assert_plan_is(plan, sample, groups, real):
    assert plan.kept[sample].tolist() == [group[0] for group in groups]
    for output, group in enumerate(groups):
        assert plan.assignment[sample, group].tolist() == [output] * len(group)
    mask = plan.mask if plan.mask is not None else torch.ones_like(plan.kept, dtype=torch.bool)
    assert mask[sample].tolist() == real
    placed = {n for group in groups for n in group}
    dropped = plan.dropped if plan.dropped is not None else torch.zeros_like(plan.assignment, dtype=torch.bool)
    assert dropped[sample].nonzero().flatten().tolist() == sorted(set(range(plan.tokens)) - placed)


def assert_merge_is(x, size, merged, merged_size, sample, groups, real):
    for output, (group, is_real) in enumerate(zip(groups, real, strict=True)):
        counts = size[sample, group].double()
        assert merged_size[sample, output] == (counts.sum() if is_real else 0)
        weights = counts / counts.sum() if is_real else torch.ones(1).double()
        expected = (x[sample, group].double() * weights[:, None]).sum(0)
        assert_close(merged[sample, output], expected, roundings=8 + len(group))


@pytest.mark.parametrize("with_guide", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("prefix_tokens", [0, 1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 2, 6, 7, 12, 25])
def test_pairs_order_sizes_and_values_are_those_of_the_loop(tokens, prefix_tokens, with_mask, with_guide):
    if prefix_tokens > tokens:
        prefix_tokens = tokens
    generator = torch.Generator().manual_seed(tokens * 10 + prefix_tokens)
    x, metric = (torch.randn(4, tokens, width, generator=generator) for width in (3, 5))
    size = torch.randint(1, 9, (4, tokens), generator=generator).float()
    guide = torch.rand(4, tokens, generator=generator) if with_guide else None
    mask = (
        torch.rand(4, tokens, generator=generator) < torch.tensor([0.9, 0.5, 0.2, 0.0])[:, None] if with_mask else None
    )
    for r in {0, 1, 2, tokens // 3, tokens // 2, tokens + 5}:
        options = {"guide_weight": 0.7, "prefix_tokens": prefix_tokens}
        merged, merged_size, plan = merge_tokens(x, metric, r, size=size, guide=guide, mask=mask, **options)
        for sample in range(4):
            own = {"guide": None if guide is None else guide[sample], "mask": None if mask is None else mask[sample]}
            groups, real = brute_force(metric[sample], r, **own, **options)
            assert_plan_is(plan, sample, groups, real)
            assert_merge_is(x, size, merged, merged_size, sample, groups, real)


def published_rule(metric, r, class_token):
    """ToMe from its description: alternate tokens form A and B, each of A keeps the edge to its most similar B, the r
    most similar edges merge; the class token never does. Returns the members of each output, unmerged A, then B."""
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    set_a, set_b = list(range(0, len(metric), 2)), list(range(1, len(metric), 2))
    edges = {a: max(set_b, key=lambda b: float(unit[a] @ unit[b])) for a in set_a if not (class_token and a == 0)}
    strongest = sorted(edges, key=lambda a: float(unit[a] @ unit[edges[a]]), reverse=True)[:r]
    unmerged = [[a] for a in set_a if a not in strongest]
    return unmerged + [[b, *sorted(a for a in strongest if edges[a] == b)] for b in set_b]


@pytest.mark.parametrize(("tokens", "r"), [(197, 16), (50, 8), (50, 24), (64, 31), (9, 4)])
@pytest.mark.parametrize("class_token", [False, True])
def test_without_a_guide_it_picks_what_tome_picks_in_tomes_order(tokens, r, class_token):
    metric = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(tokens))
    plan = merge_plan(metric, r, prefix_tokens=int(class_token))
    for sample in range(2):
        assert_plan_is(plan, sample, published_rule(metric[sample], r, class_token), [True] * (tokens - r))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [3, 13, 50, 65, 197])
@pytest.mark.parametrize("width", [1, 3, 64, 65])
def test_equal_tokens_tie_to_the_lowest_target_and_the_lowest_sources(tokens, width, dtype):
    metric = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(width)).expand(3, tokens, width).to(dtype)
    r = max(1, tokens // 4)
    plan = merge_plan(metric, r, prefix_tokens=1)
    groups, real = brute_force(torch.ones(tokens, 1), r)
    assert groups[1 + (tokens - 1) // 2 - r][1:] == [2 * (k + 1) for k in range(r)]
    for sample in range(3):
        assert_plan_is(plan, sample, groups, real)


@pytest.mark.parametrize("max_merges", [1, 2, 3])
@pytest.mark.parametrize("prefix_tokens", [0, 1, 2])
@pytest.mark.parametrize("with_guide_and_mask", [False, True])
def test_a_target_takes_no_more_sources_than_it_may(with_guide_and_mask, prefix_tokens, max_merges):
    generator = torch.Generator().manual_seed(max_merges)
    tokens = 20 + prefix_tokens % 2
    metric = 2 + torch.randn(4, tokens, 5, generator=generator)  # few targets would win most sources
    guide = torch.rand(4, tokens, generator=generator) if with_guide_and_mask else None
    mask = torch.rand(4, tokens, generator=generator) < 0.7 if with_guide_and_mask else None
    options = {"guide_weight": 0.7, "prefix_tokens": prefix_tokens}
    for r in (1, 5, tokens):
        plan = merge_plan(metric, r, max_merges=max_merges, guide=guide, mask=mask, **options)
        for sample in range(4):
            own = {"guide": None if guide is None else guide[sample], "mask": None if mask is None else mask[sample]}
            pairs = brute_force_pairs(metric[sample], r, max_merges, **own, **options)
            dropped = set() if plan.dropped is None else set(plan.dropped[sample].nonzero().flatten().tolist())
            assert set(plan.removed[sample].tolist()) - dropped == set(pairs)
            for i, j in pairs.items():
                assert plan.kept[sample, plan.assignment[sample, i]] == j


def test_a_limit_that_no_target_reaches_changes_nothing_and_one_spreads_a_flat_image():
    metric = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    free = merge_plan(metric, 8)
    for limit in (7, 8, 100):
        assert_identical(merge_plan(metric, 8, max_merges=limit).assignment, free.assignment)
    flat = torch.ones(1, 9, 4)
    assert merge_tokens(flat, flat, 4, prefix_tokens=0)[1].tolist() == [[1.0, 5.0, 1.0, 1.0, 1.0]]
    _, size, plan = merge_tokens(flat, flat, 4, prefix_tokens=0, max_merges=1)
    assert size.tolist() == [[1.0, 2.0, 2.0, 2.0, 2.0]]
    assert plan.assignment.tolist() == [[1, 1, 2, 2, 3, 3, 4, 4, 0]]


@pytest.mark.parametrize(("dtype", "power"), [(torch.float32, 30), (torch.float64, 250), (torch.bfloat16, 30)])
def test_cosine_does_not_depend_on_the_length_of_a_vector(dtype, power):
    metric = torch.randn(2, 21, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    lengths = torch.tensor([2.0, 0.5]).to(dtype).repeat(11)[:21, None] ** (3 * power)
    assert lengths.isfinite().all()
    assert_identical(merge_plan(metric * lengths, 6).assignment, merge_plan(metric, 6).assignment)


def test_a_zero_or_non_finite_vector_has_cosine_zero():
    for value in (0.0, math.nan, math.inf, -math.inf):
        metric = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, value], [0.6, 0.8], [value, 0.0]])
        plan = merge_plan(metric[None], 3, prefix_tokens=0)
        # Sources 0, 2, 4: to token 1 the cosine is negative, so the unusable tokens 3 and 5, at 0, tie.
        assert plan.removed.tolist() == [[0, 2, 4]]
        assert plan.assignment.tolist() == [[1, 0, 1, 1, 1, 2]]
        # As a source it scores 0: behind a positive similarity, before a negative one.
        metric = torch.tensor([[0.0, 1.0], [0.0, 1.0], [value, 0.0], [-1.0, 0.0], [1.0, -1.0], [-1.0, 0.0]])
        assert merge_plan(metric[None], 2, prefix_tokens=0).removed.tolist() == [[0, 2]]


def test_a_high_guide_protects_a_source_and_does_not_change_its_target():
    metric = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(1))
    free = merge_plan(metric, 5, prefix_tokens=0)
    for protecting in (1e9, math.inf, math.nan):
        guide = torch.zeros(1, 12)
        guide[0, free.removed[0, 0]] = protecting
        plan = merge_plan(metric, 5, guide=guide, prefix_tokens=0)
        assert plan.removed.tolist() == [[n for n in range(0, 12, 2) if n != free.removed[0, 0]]]
    guide = torch.zeros(1, 12)
    guide[0, 6] = -math.inf
    assert merge_plan(metric, 1, guide=guide, prefix_tokens=0).removed.tolist() == [[6]]
    everything = merge_plan(metric, 6, guide=torch.randn(1, 12) * 100, prefix_tokens=0)
    assert_identical(everything.assignment, merge_plan(metric, 6, prefix_tokens=0).assignment)
    assert_identical(
        merge_plan(metric, 3, guide=guide, guide_weight=0, prefix_tokens=0).kept,
        merge_plan(metric, 3, prefix_tokens=0).kept,
    )


@pytest.mark.parametrize(
    ("tokens", "prefix_tokens", "most"),
    [(1, 0, 0), (1, 1, 0), (2, 0, 1), (2, 1, 0), (3, 1, 1), (4, 1, 1), (5, 2, 1), (9, 5, 2)],
)
def test_r_is_clamped_to_the_number_of_pairs(tokens, prefix_tokens, most):
    plan = merge_plan(torch.randn(2, tokens, 3), 1000, prefix_tokens=prefix_tokens)
    assert (plan.r, plan.merged_tokens, plan.tokens) == (most, tokens - most, tokens)
    assert plan.prefix_tokens == prefix_tokens


def test_r_zero_changes_nothing():
    x = torch.randn(2, 7, 3)
    merged, size, plan = merge_tokens(x, x, 0)
    assert_identical(merged, x)
    assert_identical(size, torch.ones(2, 7))
    assert plan.assignment.tolist() == [list(range(7))] * 2


@pytest.mark.parametrize("shape", TOKEN_SHAPES)
def test_awkward_shapes(shape):
    x = torch.randn(shape)
    merged, size, plan = merge_tokens(x, x, shape[1], prefix_tokens=0)
    rest = shape[1] - shape[1] // 2
    assert merged.shape == (shape[0], rest, shape[2])
    assert size.shape == plan.kept.shape == (shape[0], rest)
    assert merged.is_contiguous()
    assert plan.unmerge(merged).shape == x.shape
    assert float(size.sum()) == shape[0] * shape[1]


def test_autocast_does_not_coarsen_the_matching():
    metric = torch.randn(4, 197, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        plan = merge_plan(metric, 40)
    assert_identical(plan.assignment, merge_plan(metric, 40).assignment)


def test_what_a_masked_token_holds_matters_to_no_other():
    generator = torch.Generator().manual_seed(4)
    x, mask = torch.randn(3, 14, 6, generator=generator), torch.rand(3, 14, generator=generator) < 0.6
    mask[:, 0] = True
    poisoned = x.masked_fill(~mask[..., None], torch.nan)
    clean, clean_size, plan = merge_tokens(x, x, 6, mask=mask)
    dirty, dirty_size, dirty_plan = merge_tokens(poisoned, poisoned, 6, mask=mask)
    assert plan.dropped.any()
    assert_identical(dirty_plan.assignment, plan.assignment)
    assert_identical(dirty[plan.mask], clean[plan.mask])
    assert_identical(dirty_size, clean_size)
    assert_identical(clean_size > 0, plan.mask)
    # Padding stands behind everything real, and keeps its rows.
    assert_identical(plan.mask, plan.mask.sort(dim=1, descending=True, stable=True)[0])
    padding = x.gather(1, plan.kept[..., None].expand(-1, -1, 6))
    assert_identical(clean[~plan.mask], padding[~plan.mask])
