"""Forward-mode differentiation and `torch.func` over every operator: right, or refused, never silently zero."""

import pytest
import torch
from public_operators import CASES, attempt, random, recorded_calls
from torch.autograd import forward_ad

import mlip_kernels as mk
from mlip_kernels.testing import assert_close, assert_identical

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_differentiable_case = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in CASES.items() if not name.startswith("merge_plan")]
)
NOT_OPERATORS = {"use_reference", "keep_rate_schedule", "merge_layers", "merge_schedule", "token_counts"}


def refused(error):
    """Whether an error says that there is no such derivative."""
    return isinstance(error, NotImplementedError) or "forward" in str(error).lower()


def differentiable(results):
    return [y for y in results if y.is_floating_point()]


def test_the_table_has_every_public_operator():
    assert {name.partition(" ")[0] for name in CASES} == set(mk.__all__) - NOT_OPERATORS


def jvp(case, tangents):
    return torch.func.jvp(lambda *x: tuple(differentiable(case(*x))), case.inputs, tangents)


def directions_of(case):
    """Tangents for all inputs together, then for each alone."""
    tangents = [random(*x.shape, seed=20 + i) for i, x in enumerate(case.inputs)]
    yield tangents
    for i in range(len(tangents)):
        yield [t if i == j else torch.zeros_like(t) for j, t in enumerate(tangents)]


@every_differentiable_case
def test_tangents_agree_with_gradients_or_are_refused(case):
    """``<cotangent, J tangent> = <Jᵀ cotangent, tangent>``."""
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    results = differentiable(case(*leaves))
    cotangents = [random(*y.shape, seed=30 + i) for i, y in enumerate(results)]
    pairs = [(y, c) for y, c in zip(results, cotangents, strict=True) if y.requires_grad]
    gradients = [torch.zeros_like(x) for x in leaves]
    if pairs:
        outputs, weights = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(outputs, leaves, weights, allow_unused=True, materialize_grads=True)
    for directions in directions_of(case):
        transformed, error = attempt(lambda to=tuple(directions): jvp(case, to))
        if error is not None:
            assert refused(error), error
            continue
        primal, tangents = transformed
        nothing = torch.zeros((), dtype=torch.float64)
        forward = sum(((t * c).sum() for t, c in zip(tangents, cotangents, strict=True)), nothing)
        backward = sum(((g * d).sum() for g, d in zip(gradients, directions, strict=True)), nothing)
        scale = sum(((g * d).abs().sum() for g, d in zip(gradients, directions, strict=True)), nothing)
        assert_close(torch.stack((forward, scale)), torch.stack((backward, scale)), roundings=64)
        for now, before in zip(primal, results, strict=True):
            assert_close(now, before)


@every_differentiable_case
def test_dual_tensors_have_the_same_tangents(case):
    tangents = tuple(random(*x.shape, seed=20 + i) for i, x in enumerate(case.inputs))
    transformed, error = attempt(lambda: jvp(case, tangents))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(case.inputs, tangents, strict=True)]
        results, same = attempt(lambda: differentiable(case(*duals)))
        if error is not None:
            assert refused(error), error
            assert refused(same), same
            return
        for y, tangent in zip(results, transformed[1], strict=True):
            found = forward_ad.unpack_dual(y).tangent
            assert_identical(torch.zeros_like(tangent) if found is None else found, tangent)


@every_differentiable_case
def test_torch_func_grad_is_the_gradient(case):
    def total(*inputs):
        return sum(y.square().sum() for y in differentiable(case(*inputs)))

    leaves = [x.clone().requires_grad_() for x in case.inputs]
    expected = torch.autograd.grad(total(*leaves), leaves)
    found = torch.func.grad(total, argnums=tuple(range(len(leaves))))(*case.inputs)
    for one, two in zip(found, expected, strict=True):
        assert_close(one, two, roundings=64)


@every_case
def test_vmap_gives_what_a_loop_gives(case):
    several = [torch.stack((x, x.flip(0), x + 1)) for x in case.inputs]
    mapped = torch.func.vmap(case)(*several)
    with mk.use_reference():
        inside = torch.func.vmap(case)(*several)
    for i, inputs in enumerate(zip(*several, strict=True)):
        for found, plain, expected in zip(mapped, inside, case(*inputs), strict=True):
            for one in (found[i], plain[i]):
                assert_close(one, expected) if expected.is_floating_point() else assert_identical(one, expected)


def test_direct_calls_of_differentiable_operators_refuse_tangents():
    choosing = {"merging_match", "merging_match_capped"}  # results are integers
    for operator, arguments in dict(recorded_calls()).items():
        name = operator._schema.name
        floating = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.is_floating_point()]
        if name.partition("::")[2] in choosing or not floating:
            continue
        given = list(arguments)
        with forward_ad.dual_level():
            given[floating[0]] = forward_ad.make_dual(given[floating[0]], torch.ones_like(given[floating[0]]))
            with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative"):
                operator(*given)


def test_a_transform_of_a_direct_call_refuses_tangents():
    operator = torch.ops.mlip_kernels.merging_weighted_mean.default
    x = random(2, 3, 4)
    with pytest.raises(NotImplementedError, match="merging_weighted_mean"):
        torch.func.jvp(lambda x: operator(x, None, 0)[0], (x,), (x,))
