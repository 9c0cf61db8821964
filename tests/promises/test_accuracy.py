"""Results and gradients err at most twice as much as those of PyTorch in the same dtype, measured against float64."""

import pytest
import torch
from operators import assert_right, cases, splits

from mlip_kernels.testing import DTYPES, uninitialized_memory_is_nan


@pytest.mark.parametrize("case", [*cases(*DTYPES, functions=True), *splits(torch.float32)])
def test_results_and_gradients_are_as_accurate_as_those_of_pytorch(case):
    with uninitialized_memory_is_nan():
        found = case.comparable()
    assert_right(case, found)
