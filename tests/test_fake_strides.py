"""What is traced has the strides of what runs: compiled code works on both."""

import pytest
import torch
from public_operators import CASES, names_of, recorded_calls
from torch._subclasses.fake_tensor import FakeTensorMode

import mlip_kernels as mk
from mlip_kernels.testing import permuted

CALLS = recorded_calls()


def layouts(results):
    results = [results] if isinstance(results, torch.Tensor) else results or ()
    return [(tuple(y.shape), y.stride(), y.dtype) for y in results]


def every_second(x):
    """The same values, apart from each other."""
    return torch.stack((x, x), dim=-1)[..., 0]


def batch_inside(x):
    """The same values with the batch not outermost."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x


ARRANGED = {
    "contiguous": torch.Tensor.contiguous,
    "permuted": permuted,
    "every second": every_second,
    "batch inside": batch_inside,
}


@pytest.mark.parametrize("arrange", ARRANGED.values(), ids=ARRANGED.keys())
@pytest.mark.parametrize(("operator", "arguments"), CALLS, ids=names_of(CALLS))
def test_registered_operators(operator, arguments, arrange):
    given = [arrange(a) if isinstance(a, torch.Tensor) and a.dim() else a for a in arguments]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given]
        promised = layouts(operator(*fakes))
    assert layouts(operator(*given)) == promised


@pytest.mark.parametrize("arrange", ARRANGED.values(), ids=ARRANGED.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_public_functions(case, arrange):
    given = [arrange(x) for x in case.inputs]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        promised = layouts(case(*map(mode.from_tensor, given)))
    assert layouts(case(*given)) == promised


@pytest.mark.parametrize("size", [[[1.0] * 17, [2.0] * 17], [[1.0] * 17, [0.0] * 17], None])
def test_attention_has_the_strides_of_that_of_torch_whatever_the_sizes(size):
    """As it comes from a projection to q, k and v, so that heads can be joined by a view."""
    q, k, v = torch.randn(2, 17, 3, 4, 8).permute(2, 0, 3, 1, 4)
    size = None if size is None else torch.tensor(size)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert mk.proportional_attention(q, k, v, size).stride() == expected.stride()
    padded = mk.proportional_attention(q, k, v, size, padding=False)
    assert padded.stride() == expected.stride()
