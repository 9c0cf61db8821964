"""Token merging on its GPU kernels: plans to the last tie, rows and gradients bit for bit, masks, hard input."""

import sys
from pathlib import Path

import pytest
import torch

from mlip_kernels import MergePlan, merge_plan, merge_tokens, use_reference
from mlip_kernels.merging import plain as reference
from mlip_kernels.testing import assert_identical, gradients, permuted

sys.path.append(str(Path(__file__).parents[1] / "merging"))
from test_merge_kernels import assert_same_plan, masks, metrics, random

BACKENDS = ("cuda",)
ARCHITECTURES = (80, 90)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GUIDED = {"guide": True, "guide_weight": 0.3}
# N, D and options: tails of every kind; one tile and several; the longest for one launch, and longer ones.
PLANS = (
    (1, 3, {"prefix_tokens": 0, "r": 5}),
    (2, 1, {"prefix_tokens": 0, "r": 5}),
    (21, 33, {"prefix_tokens": 5, **GUIDED}),
    (50, 64, {"masked": True, "prefix_tokens": 2, "r": 1000, **GUIDED}),
    (65, 768, {}),
    (140, 72, {"masked": True, "prefix_tokens": 0}),
    (301, 40, {"prefix_tokens": 1, "r": 150, **GUIDED}),
)
LONG_PLANS = (
    (1024, 8, {"masked": True, "prefix_tokens": 0, **GUIDED}),
    (1301, 8, {"masked": True, "prefix_tokens": 2, **GUIDED}),
    (2100, 3, {"prefix_tokens": 1, "r": 1000}),
)


@pytest.fixture(
    params=[
        *(pytest.param((b, arch), id=f"{b}-sm{arch}") for b in BACKENDS for arch in ARCHITECTURES),
        *(pytest.param((b,), id=f"{b}-gpu", marks=pytest.mark.gpu) for b in BACKENDS),
    ]
)
def cuda(request, needs_emulated):
    backend, *arch = request.param
    if not arch:
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU that torch can use")
        from emulated_cuda.real import RealCuda

        return RealCuda(backend)
    needs_emulated(backend)
    from emulated_cuda import EmulatedCuda

    return EmulatedCuda(backend, *arch, multiprocessors=1)


def options_of(shape, *, dtype=torch.float32, guide=False, masked=False, r=None, **options):
    batch, tokens, _ = shape
    if guide:
        options["guide"] = random(batch, tokens, seed=1).to(dtype)
    if masked:
        options["mask"] = masks(batch, tokens)
        options["mask"][-1, 3:] = False  # no pair at all
    return {"r": max(1, tokens // 4) if r is None else r, **options}


def on(cuda, function, *arguments, **options):
    with cuda:
        arguments = [cuda.put(t) if isinstance(t, torch.Tensor) else t for t in arguments]
        options = {k: cuda.put(t) if isinstance(t, torch.Tensor) else t for k, t in options.items()}
        return function(*arguments, **options)


def assert_plan_of_reference(cuda, metric, options):
    found = on(cuda, merge_plan, metric, **options)
    with use_reference():
        expected = merge_plan(metric, **options)
    assert_same_plan(found, expected)
    return expected


@pytest.mark.parametrize("kind", ["random", "similar", "few values", "scaled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plans_are_those_of_the_reference_to_the_last_tie(cuda, kind, dtype):
    for tokens, width, options in PLANS:
        shape = 2, tokens, width
        assert_plan_of_reference(cuda, metrics(kind, *shape, dtype=dtype), options_of(shape, dtype=dtype, **options))
    assert set(cuda.operators) == {"merging_match"}


@pytest.mark.parametrize(("dtype", "kind"), list(zip(DTYPES, ["random", "few values", "scaled"], strict=True)), ids=str)
def test_long_plans_are_those_of_the_reference(cuda, dtype, kind):
    for tokens, width, options in LONG_PLANS:
        shape = 1, tokens, width
        options = options_of(shape, dtype=torch.float64, **options)
        if "mask" in options:
            options["mask"] = masks(1, tokens)
        assert_plan_of_reference(cuda, metrics(kind, *shape, dtype=dtype), options)


@pytest.mark.parametrize(("tokens", "r", "class_token"), [(50, 8, True), (65, 31, False), (197, 16, True)])
def test_without_a_guide_it_picks_what_tome_picks_in_tomes_order(cuda, tokens, r, class_token):
    from test_merge_plan import assert_plan_is, published_rule

    metric = random(1, tokens, 16, seed=tokens)
    with cuda:
        plan = merge_plan(cuda.put(metric), r, prefix_tokens=int(class_token))
    assert_plan_is(plan, 0, published_rule(metric[0], r, class_token), [True] * (tokens - r))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 64])
def test_equal_tokens_tie_to_the_lowest(cuda, dtype, width):
    metric = random(1, 1, width).expand(2, 150, width).to(dtype)
    plan = assert_plan_of_reference(cuda, metric, {"r": 20})
    assert plan.removed[0].tolist() == [2 * (k + 1) for k in range(20)]
    assert (plan.assignment[0].gather(0, plan.removed[0]) == 1 + 74 - 20).all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_without_direction_have_cosine_zero_and_odd_guides_an_order(cuda, value, dtype):
    metric = metrics("random", 2, 70, 9, dtype=dtype)
    metric[0, 10], metric[0, 11, 4], metric[0, 33], metric[1, 1::2] = value, value, value, -metric[1, :1].abs()
    metric[1, 13], metric[1, 0::2] = value, metric[1, :1].abs()  # the best cosine is 0
    guide = random(2, 70, seed=1)
    guide[:, 4], guide[:, 8], guide[:, 12], guide[:, 16], guide[:, 20] = (
        float("nan"), float("inf"), -float("inf"), 1e30, -1e30,
    )  # fmt: skip
    for weight in (1.0, -1e300):
        for r in (3, 30):
            assert_plan_of_reference(cuda, metric, {"r": r, "guide": guide.double(), "guide_weight": weight})


def layouts():
    return (
        permuted,
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: torch.cat([t[:, :1], t], 1)[:, 1:],
        lambda t: t[:1].expand(t.shape),
    )


@pytest.mark.parametrize("layout", range(len(layouts())))
def test_strides_do_not_matter(cuda, layout):
    change, shape = layouts()[layout], (3, 40, 24)
    metric, guide, size = random(*shape), random(3, 40, seed=1), random(3, 40, seed=2).abs()
    arguments = [change(t) for t in (metric, metric, guide, masks(3, 40), size)]
    with use_reference():
        expected = merge_everything(*arguments)
    for found, wanted in zip(on(cuda, merge_everything, *arguments), expected, strict=True):
        assert_identical(found.cpu(), wanted)


def merge_everything(x, metric, guide, mask, size):
    merged, merged_size, plan = merge_tokens(x, metric, 11, size=size, guide=guide, mask=mask)
    return merged, merged_size, plan.assignment, plan.kept, plan.removed, plan.unmerge(merged)


def rows_and_gradients(plan, x, y, size, put):
    """Merging with and without sizes and copying back, and the gradients of both, those of merging to second order."""
    maps = (None if t is None else put(t) for t in plan._matching())
    assignment, kept, removed, mask, dropped = maps
    plan = MergePlan(assignment, kept, removed, plan.prefix_tokens, mask=mask, dropped=dropped)
    x, y, size = put(x).requires_grad_(), put(y).requires_grad_(), put(size)
    results = []
    for given in (size, None):
        merged, merged_size = plan.merge(x, given)
        (grad,) = torch.autograd.grad(merged, x, y, create_graph=True)
        results += [merged, merged_size, grad, *torch.autograd.grad(grad, y, x)]
    spread = plan.unmerge(y)
    return [t.detach().cpu() for t in (*results, spread, *torch.autograd.grad(spread, y, x))]


def rows_of_reference(plan, x, y, size):
    """What `rows_and_gradients` is to be: plain autograd adds the terms of a gradient in another order."""
    matching = plan._matching()
    results = []
    for given in (size, torch.ones_like(size)):
        _, weight = reference.merged_sizes(given, matching, torch.float32)
        results += [*reference.merge(x, given, matching), reference.spread(y, weight, matching)]
        results += [reference.combine(x, weight, matching)]
    return [*results, reference.unmerge(y, matching), reference.combine(x, None, matching)]


def assert_rows_of_reference(cuda, x, y, plan, size):
    with cuda:
        found = rows_and_gradients(plan, x, y, size, cuda.put)
    for number, (one, two) in enumerate(zip(found, rows_of_reference(plan, x, y, size), strict=True)):
        assert_identical(one, two, name=f"result {number}")


def test_padding_may_hold_anything_in_every_direction(cuda):
    x, mask, y = random(3, 60, 33), masks(3, 60), random(3, 40, 33, seed=1)
    plan = merge_plan(x, 20, mask=mask)
    assert plan.dropped.any()
    poisoned = x.masked_fill(~mask[..., None], torch.nan)

    with cuda:
        found = rows_and_gradients(plan, poisoned, y, torch.ones(3, 60), cuda.put)
    for one, clean in zip(found, rows_of_reference(plan, x, y, torch.ones(3, 60)), strict=True):
        if one.shape[1:] == (40, 33):  # rows of the output; those of its padding may hold anything, too
            one, clean = one[plan.mask], clean[plan.mask]
        assert_identical(one, clean)
    merged = on(cuda, merge_tokens, poisoned, poisoned, 20, mask=mask)
    assert_same_plan(on(cuda, merge_plan, poisoned, 20, mask=mask), plan)
    assert_identical(merged[0].cpu()[plan.mask], plan.merge(x)[0][plan.mask])


def test_composed_plans_merge_more_rows_than_half(cuda):
    x = random(2, 65, 40)
    first = merge_plan(x, 30)
    second = merge_plan(first.merge(x)[0], 15)
    plan = first.then(second)
    assert_rows_of_reference(cuda, x, random(2, 20, 40, seed=1), plan, random(2, 65, seed=2).abs())


@pytest.mark.parametrize("batch", [0, 2])
def test_launches(cuda, batch):
    def run(x, metric):
        merged, _, plan = merge_tokens(x, metric, 5)
        return plan.unmerge(merged)

    x = random(batch, 24, 8)
    found = on(cuda, gradients, lambda x: run(x, x.detach()), [x])
    with use_reference():
        assert_identical(found[0].cpu(), gradients(lambda x: run(x, x), [x])[0])
    assert cuda.operators == [f"merging_{name}" for name in ("match", "merge", "spread", "combine", "spread")]
    if hasattr(cuda, "launches"):
        assert len(cuda.launches) == (5 if batch else 0)


def test_float64_is_left_to_the_reference(cuda):
    x = random(2, 30, 9, dtype=torch.float64)
    with use_reference():
        expected = merge_tokens(x, x, 7)
    found = on(cuda, merge_tokens, x, x, 7)
    assert_same_plan(found[2], expected[2])
    assert not cuda.operators


@pytest.mark.parametrize("schedule", [("reversed", 0), ("random", 1)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_order_of_the_warps_changes_a_bit(backend, schedule, needs_emulated):
    needs_emulated(backend)
    from emulated_cuda import EmulatedCuda

    x, metric = random(2, 150, 40), metrics("few values", 2, 150, 24)
    arguments = x, metric, metric[..., 0], masks(2, 150), random(2, 150, seed=2).abs()
    with use_reference():
        expected = merge_everything(*arguments)
    cuda = EmulatedCuda(backend, 80, schedule=schedule[0], seed=schedule[1])
    for found, wanted in zip(on(cuda, merge_everything, *arguments), expected, strict=True):
        assert_identical(found, wanted)
