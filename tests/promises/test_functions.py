"""``apply`` of the classes in `mlip_kernels.functions` is the public function, bit for bit."""

import dataclasses

import pytest
from operators import FUNCTIONS, cases
from operators.functions import public_of

from mlip_kernels.testing import assert_identical


@pytest.mark.parametrize("case", cases(functions=True, where=lambda case: case.operator in FUNCTIONS))
def test_apply_is_the_public_function(case):
    """Where there is no mask, that of ``MatchTokens`` is empty."""
    public = dataclasses.replace(case, operator=public_of(case.operator))
    found, expected = ([y for y in of.results_and_gradients() if y.numel()] for of in (case, public))
    for one, other in zip(found, expected, strict=True):
        assert_identical(one, other)
