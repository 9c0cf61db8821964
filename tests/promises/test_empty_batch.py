"""An empty batch has empty results, and gradients that are empty or zero."""

import pytest
import torch
from operators import cases

import mlip_kernels as mk
from mlip_kernels.testing import assert_identical


@pytest.mark.parametrize("case", cases(torch.float32, where=lambda case: case.operator.name != "pair_cross_entropy"))
def test_results_and_gradients_of_nothing(case):
    """Without a pair, a loss has no mean: tests/contrastive/test_pair_cross_entropy.py."""
    empty = case.map_batch(lambda t: t[:0])
    with mk.use_reference():
        expected = empty.results_and_gradients(function=case.operator.definition)
    for found, wanted in zip(empty.results_and_gradients(), expected, strict=True):
        assert_identical(found, torch.zeros_like(wanted))
