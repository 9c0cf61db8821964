"""Export to ONNX: the reference exports and keeps the order of ties, and the kernels say that it is what to export."""

import contextlib
import io

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mlip_kernels as mk
from mlip_kernels.testing import assert_close, assert_identical

X = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.arange(12)[None] < torch.tensor([[12], [9]])

OPERATORS = {
    "dct": lambda x: mk.dct(x, grid=(3, 4)),
    "amplitude_phase": lambda x: mk.amplitude_phase(x)[0],
    "merge_tokens": lambda x: mk.merge_tokens(x, x, 3, guide=x[..., 0], mask=MASK)[0],
    "weighted_mean": lambda x: mk.weighted_mean(x, x[..., 0].abs()),
    "token_logits": lambda x: torch.cat(mk.token_logits(x, x, image_mask=MASK)),
}


class Module(torch.nn.Module):
    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, x):
        return self.operator(x)


def run_exported(operator, example, x):
    """What ONNX Runtime computes for x from a module that was exported with an example."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="torch.onnx.export needs it")
    runtime = pytest.importorskip("onnxruntime", reason="runs what was exported")
    with mk.use_reference(), contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(Module(operator).eval(), (example,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
def test_the_reference_exports(operator):
    other = X.flip(0, 1)
    assert_close(run_exported(operator, X, other), operator(other), roundings=32)


def test_ties_go_to_the_lowest_position_in_onnx_too():
    tied = torch.ones(2, 12, 1) * torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat(3)[None, :, None]

    def merge(x):
        plan = mk.merge_plan(x, 3)
        return torch.cat((plan.assignment, plan.kept, plan.removed), 1)

    assert_identical(run_exported(merge, X[..., :1], tied), merge(tied))


@pytest.fixture
def exporting(monkeypatch):
    """While ONNX is exported; the packages that write it are not needed for what happens before."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.usefixtures("exporting")
def test_kernels_refuse_and_name_the_reference(operator):
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=r"mlip_kernels\.use_reference"):
        operator(torch.empty(2, 12, 4))


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.usefixtures("exporting")
def test_the_graph_of_the_reference_has_nothing_that_onnx_lacks(operator):
    with mk.use_reference():
        program = torch.export.export(Module(operator), (X,)).run_decompositions()
    targets = {str(node.target) for node in program.graph.nodes}
    assert not targets & {"aten.sort.stable", "aten.argsort.stable", "aten.hypot.default", "prims.hypot.default"}
    assert not [target for target in targets if target.startswith("mlip_kernels.")]


@pytest.mark.usefixtures("exporting")
def test_what_stands_in_for_hypot_is_as_right():
    from mlip_kernels._tracing import hypot

    x, y = X[0] * 1e30, X[1] * 1e30
    x[0] = y[0] = 0
    assert_close(hypot(x, y), (x.double() ** 2 + y.double() ** 2).sqrt().float(), roundings=2)


def test_outside_of_an_export_nothing_is_refused():
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert mk.dct(torch.empty(2, 12, 4)).shape == (2, 12, 4)
