"""Calls run on the registered operators that the table names; `use_reference` and transforms keep away from them."""

import pytest
import torch
from operators import BY_TORCH, cases
from recorded import Recorder

import mlip_kernels as mk


@pytest.mark.parametrize("case", cases(functions=True))
def test_what_runs(case):
    with Recorder() as plain, mk.use_reference():
        case.results_and_gradients()
    with Recorder() as transformed:
        torch.func.vmap(lambda _: case())(torch.zeros(2))
    with Recorder() as recorder:
        case()
    assert not plain.names
    assert not transformed.names
    assert set(recorder.names) <= set(case.operator.kernels)
    assert recorder.names or not case.operator.kernels or case.sample in (*BY_TORCH, "nothing to merge")
