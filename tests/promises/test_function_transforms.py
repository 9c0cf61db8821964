"""`torch.func.grad` gives the gradient and `torch.func.vmap` what a loop gives, with kernels and without."""

import contextlib

import pytest
import torch
from operators import cases

import mlip_kernels as mk
from mlip_kernels.testing import assert_close, assert_identical


@pytest.mark.parametrize("definition", [contextlib.nullcontext, mk.use_reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("case", cases(functions=True))
def test_grad_and_vmap(case, definition):
    several = [torch.stack((x, x.flip(0), x + 1)) for x in case.inputs]
    with definition():
        found = torch.func.vmap(case)(*several) if several else torch.func.vmap(lambda _: case())(torch.zeros(3))
    for number in range(3):
        for one, expected in zip(found, case(*(x[number] for x in several)), strict=True):
            compare = assert_close if expected.is_floating_point() else assert_identical
            compare(one[number], expected)
    if not case.inputs:
        return

    def total(*inputs):
        return sum(y.square().sum() for y in case.numbers(*inputs))

    leaves = [x.clone().requires_grad_() for x in case.inputs]
    with definition():
        found = torch.func.grad(total, argnums=tuple(range(len(leaves))))(*case.inputs)
    for one, other in zip(found, torch.autograd.grad(total(*leaves), leaves), strict=True):
        assert_close(one, other)
