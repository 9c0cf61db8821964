"""No input is modified, forward or backward, and no result shares memory with one."""

import pytest
import torch
from operators import cases, tensors

from mlip_kernels.testing import assert_identical


@pytest.mark.parametrize("case", cases(torch.float32, torch.bfloat16))
def test_inputs_stay_as_they_are(case):
    given = tensors(tuple(v for v in case.arguments.values() if tensors_in(v)))
    before = [(t.clone(), t._version) for t in given]
    results = case.results_and_gradients()
    for tensor, (values, version) in zip(given, before, strict=True):
        assert_identical(tensor, values)
        assert tensor._version == version
    memory = {t.untyped_storage().data_ptr() for t in given}
    assert not any(y.untyped_storage().data_ptr() in memory for y in results if y.numel())


def tensors_in(value):
    return isinstance(value, torch.Tensor) or hasattr(value, "assignment")
