"""Fake tensors have the shapes, strides and dtypes of real ones: compiled code works on both."""

import pytest
import torch
from operators import cases, tensors, traceable
from recorded import direct_calls
from test_layouts import batch_inside, every_second
from torch._subclasses.fake_tensor import FakeTensorMode

from mlip_kernels.testing import permuted

LAYOUTS = (torch.Tensor.contiguous, permuted, every_second, batch_inside)
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def described(results):
    return [(tuple(y.shape), y.stride(), y.dtype) for y in tensors(results)]


@every_layout
@pytest.mark.parametrize("case", cases(torch.float32, where=traceable))
def test_public_functions(case, layout):
    real = case.map(lambda t: layout(t) if t.dim() else t)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        promised = described(real.map(mode.from_tensor)())
    assert described(real()) == promised


@every_layout
@pytest.mark.parametrize(("operator", "arguments"), direct_calls())
def test_registered_operators(operator, arguments, layout):
    given = [layout(a.detach()) if isinstance(a, torch.Tensor) and a.dim() else a for a in arguments]
    with FakeTensorMode() as mode:
        promised = described(operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given)))
    assert described(operator(*given)) == promised
