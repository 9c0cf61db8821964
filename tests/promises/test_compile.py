"""``torch.compile(fullgraph=True, dynamic=True)``: one graph for every batch, with the results of eager, of kernels."""

import pytest
import torch
from functorch.compile import make_boxed_func
from operators import cases, leading
from torch._dynamo.backends.common import aot_autograd

from mlip_kernels.testing import assert_close, assert_identical

MATRICES = {"aten.cos.default", "aten.arange.default", "aten.mm.default", "aten.bmm.default"}
"""What computes matrices in a graph, or multiplies by them."""


@pytest.mark.parametrize("case", cases(torch.float32, where=leading, functions=True))
def test_one_graph_has_the_results_and_gradients_of_eager(case):
    torch._dynamo.reset()
    graphs = []

    def record(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    rest = {name: value for name, value in case.arguments.items() if not isinstance(value, torch.Tensor)}
    backend = aot_autograd(fw_compiler=record)
    compiled = torch.compile(
        lambda **given: case.operator.function(**given, **rest), fullgraph=True, dynamic=True, backend=backend
    )

    def function(**arguments):
        return compiled(**{name: value for name, value in arguments.items() if name not in rest})

    for count in (1,) if "self" in rest else (5, 7):  # no batch is as long as another axis, or it would be taken for it
        sized = case.map_batch(lambda t, count=count: torch.cat([t] * count))
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = sized.trained(function=function), sized.trained()
        for one, other in zip(found, expected, strict=True):
            (assert_close if other.is_floating_point() else assert_identical)(one, other)
    assert len(graphs) == (2 if case.names else 1)  # forward and backward, for both sizes
    ours = [node for node in graphs[0] if node.startswith("mlip_kernels.")]
    assert len(ours) == case.operator.nodes
    assert {node.split(".")[1] for node in ours} <= set(case.operator.kernels)
    assert case.operator.family != "spectral" or not MATRICES & {node for graph in graphs for node in graph}
