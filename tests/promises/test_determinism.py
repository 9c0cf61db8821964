"""Results and gradients are the same bits again and on any number of threads."""

from pathlib import Path

import pytest
import torch
from operators import OPERATORS, splits

from mlip_kernels.testing import assert_identical, threads


@pytest.mark.parametrize("case", splits(torch.float32, torch.bfloat16, where=lambda case: case.operator.kernels))
def test_threads_change_no_bit(case):
    with threads(1):
        expected = case.results_and_gradients()
    for count in (1, 2, 3):
        with threads(count):
            for one, other in zip(case.results_and_gradients(), expected, strict=True):
                assert_identical(one, other, name=f"{case.operator.name} on {count} threads")


PYTORCHS = ("ClipLoss", "SigLipLoss", "TokenContrastiveLoss", "FrequencyStage", "AttentionPool")
"""Modules that compute with PyTorch's products and sums, which may split their work by the number of threads."""


def test_the_readme_names_what_may_depend_on_the_number_of_threads():
    readme = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    sentence = next(part for part in readme.split("\n\n") if part.startswith('"Deterministic"'))
    kernels, others = ([row.name for row in OPERATORS if bool(row.kernels) == ours] for ours in (True, False))
    assert all(f"`{name}`" in sentence for name in (*others, *PYTORCHS))
    assert not any(f"`{name}`" in sentence for name in kernels)
