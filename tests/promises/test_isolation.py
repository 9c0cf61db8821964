"""What one element of the batch holds changes no bit of another."""

import pytest
import torch
from operators import cases

from mlip_kernels.testing import assert_identical


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", cases(torch.float32, where=lambda case: case.operator.per_sample))
def test_elements_of_the_batch_are_apart(case, value):
    def spoilt(x):
        return torch.cat((torch.full_like(x[:1], value), x[1:]))

    name = case.names[0] if case.names else "metric"
    for found, expected in zip(case.replace(**{name: spoilt(case.arguments[name])})(), case(), strict=True):
        assert_identical(found[1:], expected[1:])
