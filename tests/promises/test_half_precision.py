"""Half precision is computed in float32 and rounded once: results are those of float32, rounded."""

import pytest
import torch
from operators import cases

from mlip_kernels.testing import assert_identical


@pytest.mark.parametrize("case", cases(torch.bfloat16, torch.float16, where=lambda case: case.operator.kernels))
def test_results_are_those_of_float32_rounded(case):
    wide = case.map(lambda t: t.float() if t.is_floating_point() else t)
    for found, expected in zip(case(), wide(), strict=True):
        assert_identical(found, expected.to(found.dtype))
