"""Forward-mode derivatives agree with gradients, or are refused: never silently zero."""

import pytest
import torch
from operators import attempt, cases, cotangent, differentiable, random, tensors
from recorded import direct_calls
from torch.autograd import forward_ad

from mlip_kernels.testing import assert_close, assert_identical


def refused(error):
    return isinstance(error, NotImplementedError) or "forward" in str(error).lower()


def directions(case):
    """Tangents for all inputs together, then for each alone."""
    tangents = tuple(random(*x.shape, dtype=x.dtype, seed=20 + i) for i, x in enumerate(case.inputs))
    yield tangents
    for i in range(len(tangents)):
        yield tuple(t if i == j else torch.zeros_like(t) for j, t in enumerate(tangents))


def dual(case, tangents):
    """The tangents of the results without `torch.func`."""
    with forward_ad.dual_level():
        results = case.numbers(*map(forward_ad.make_dual, case.inputs, tangents))
        found = [forward_ad.unpack_dual(y) for y in results]
        return [torch.zeros_like(y) if tangent is None else tangent for y, tangent in found]


@pytest.mark.parametrize("case", cases(where=differentiable, functions=True))
def test_tangents_agree_with_gradients_or_are_refused(case):
    """``<cotangent, J tangent> = <Jᵀ cotangent, tangent>``."""
    results, gradients = case.numbers(), case.gradients()
    for tangents in directions(case):
        transformed, refusal = attempt(lambda to=tangents: torch.func.jvp(case.numbers, case.inputs, to))
        if refusal is not None:
            _, same = attempt(lambda to=tangents: dual(case, to))
            assert refused(refusal), refusal
            assert refused(same), same
            continue
        found, tangents_of_results = transformed
        forward = torch.stack([(t * cotangent(t, i)).sum() for i, t in enumerate(tangents_of_results)])
        backward = torch.stack([(g * t).sum() for g, t in zip(gradients, tangents, strict=True)])
        scale = torch.stack([(g * t).abs().sum() for g, t in zip(gradients, tangents, strict=True)]).sum()
        assert_close(torch.stack((forward.sum(), scale)), torch.stack((backward.sum(), scale)))
        for one, other in zip(found, results, strict=True):
            assert_close(one, other)
        for one, other in zip(dual(case, tangents), tangents_of_results, strict=True):
            assert_identical(one, other)


@pytest.mark.parametrize(("operator", "arguments"), direct_calls())
def test_registered_operators_refuse_tangents(operator, arguments):
    place = next((i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.is_floating_point()), None)
    if place is None or not operator._schema.returns or "match" in operator._schema.name:
        pytest.skip("has nothing to differentiate")
    message = f"{operator._schema.name} has no forward-mode derivative"
    given = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    x = given[place]

    def call(x):
        return operator(*given[:place], x, *given[place + 1 :])

    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        call(forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda x: tensors(call(x))[0], (x,), (x,))
