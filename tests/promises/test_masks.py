"""Any byte but 0 of a mask is true, as for torch: `uint8.view(bool)` and `frombuffer` make others than 1."""

import contextlib

import pytest
import torch
from operators import cases, tensors

import mlip_kernels as mk
from mlip_kernels.testing import assert_identical


def masked(case):
    values = case.arguments.values()
    return any(t.dtype == torch.bool for v in values if isinstance(v, (torch.Tensor, mk.MergePlan)) for t in tensors(v))


MASKED = [parameter for parameter in cases(torch.float32, torch.float64) if masked(parameter.values[0])]


@pytest.mark.parametrize("byte", [2, 254, 255])
@pytest.mark.parametrize("definition", [contextlib.nullcontext, mk.use_reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("case", MASKED)
def test_any_byte_is_true(case, definition, byte):
    odd = case.map(lambda t: (t.to(torch.uint8) * byte).view(torch.bool) if t.dtype == torch.bool else t)
    with definition():
        for one, other in zip(odd.results_and_gradients(), case.results_and_gradients(), strict=True):
            assert_identical(one != 0 if one.dtype == torch.bool else one, other)
