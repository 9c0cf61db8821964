"""Training works after inference, and inference gives what training gives: nothing remembered belongs to either."""

import pytest
import torch
from operators import cases

from mlip_kernels.testing import assert_identical


@pytest.mark.parametrize("case", cases(torch.float32))
def test_training_after_inference(case, forget):
    with torch.inference_mode():
        results = [y.clone() for y in case()]
    for one, other in zip(results, case(), strict=True):
        assert_identical(one, other)
    for gradient in case.gradients():
        assert gradient.isfinite().all()
