"""The table of operators is whole: every public operator has a row, and every registered operator runs for one."""

import pytest
import torch
from operators import FUNCTIONS, OPERATORS, parameters
from recorded import recorded_calls

import mlip_kernels as mk
from mlip_kernels._library import LOADED

NOT_OPERATORS = {"MergePlan", "keep_rate_schedule", "merge_layers", "merge_schedule", "token_counts", "use_reference"}
METHODS = {"MergePlan.merge", "MergePlan.unmerge"}


def test_every_public_operator_has_a_row():
    assert {operator.name for operator in OPERATORS} == set(mk.__all__) - NOT_OPERATORS | METHODS


def test_every_class_has_a_row():
    assert {operator.name for operator in FUNCTIONS} == {f"{name}.apply" for name in mk.functions.__all__}
    assert all(issubclass(getattr(mk.functions, name), torch.autograd.Function) for name in mk.functions.__all__)


def test_every_argument_with_a_gradient_is_given_in_some_sample():
    for operator in OPERATORS:
        given = {name for sample in operator.samples(torch.float32).values() for name in sample}
        assert set(operator.differentiable) <= given <= set(parameters(operator)), operator.name


@pytest.mark.skipif(LOADED["cpu"] != "ok", reason="needs the compiled CPU part: pip install .")
def test_every_kernel_runs():
    """Of the operators with a kernel of the CPU, each is called for some row."""
    with torch.profiler.profile() as profile:
        recorded_calls.__wrapped__()
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mlip_kernels::")]
    compiled = {name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")}
    assert compiled <= {event.name for event in profile.events()}
