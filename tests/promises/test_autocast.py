"""Autocast changes no bit of results and gradients, but for arguments that a row says it rounds."""

import pytest
import torch
from operators import cases

from mlip_kernels.testing import assert_identical


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", cases(torch.float32))
def test_autocast_is_handled_on_purpose(case, dtype):
    def rounded(**arguments):
        for name in case.operator.rounded_by_autocast:
            arguments[name] = arguments[name].to(dtype)
        return case.operator.function(**arguments)

    expected = case.results_and_gradients(function=rounded)
    with torch.autocast("cpu", dtype):
        found = case.results_and_gradients()
    for one, other in zip(found, expected, strict=True):
        assert_identical(one, other)
