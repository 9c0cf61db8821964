"""Where elements stand in memory changes no result and no gradient."""

import pytest
import torch
from operators import cases

from mlip_kernels.testing import assert_close, assert_identical, permuted


def beside_others(x):
    """Memory that starts at no multiple of a vector."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def every_second(x):
    return torch.stack((x, x), dim=-1)[..., 0]


def batch_inside(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x


def one_for_all(x):
    """The first element of the batch for every other, without copies of it."""
    return x[:1].expand(x.shape) if x.dim() else x


def negated(x):
    """A view with the negative bit."""
    return torch._neg_view(-x) if x.is_floating_point() else x


LAYOUTS = (permuted, beside_others, every_second, batch_inside, one_for_all, negated)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("case", cases(torch.float32))
def test_results_and_gradients_are_the_same(case, layout):
    arranged = case.map(layout)
    dense = arranged.map(lambda t: t.resolve_neg().clone(memory_format=torch.contiguous_format))
    compare = assert_identical if case.operator.kernels else assert_close  # torch's attention chooses by strides
    for one, other in zip(arranged.results_and_gradients(), dense.results_and_gradients(), strict=True):
        compare(one, other)
