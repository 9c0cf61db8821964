"""First derivatives are those of finite differences; second ones too, or they are refused outside the reference."""

import re

import pytest
import torch
from operators import attempt, cases, differentiable

import mlip_kernels as mk

DIFFERENTIABLE = cases(where=differentiable, functions=True)


@pytest.mark.parametrize("case", DIFFERENTIABLE)
def test_derivatives_are_those_of_finite_differences(case):
    leaves = [x.clone().requires_grad_() for x in case.inputs]

    def function(*inputs):
        return tuple(y for y in case.operator.comparable(*case(*inputs)) if y.is_floating_point())

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    _, refusal = attempt(lambda: torch.autograd.gradgradcheck(function, leaves, fast_mode=True))
    if refusal is None:
        return
    assert case.operator.derivatives == 1
    assert re.search(r"no second derivative.*use_reference|is not implemented", str(refusal)), refusal
    if case.operator.kernels:
        with mk.use_reference():
            assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
