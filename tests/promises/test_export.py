"""``torch.export`` makes one node of an operator, for every batch, with the results of eager once it was saved."""

import io

import pytest
import torch
from operators import cases, leading, tensors

from mlip_kernels.testing import assert_close, assert_identical


class Call(torch.nn.Module):
    def __init__(self, case, names):
        super().__init__()
        self.function = case.operator.function
        self.rest = {name: value for name, value in case.arguments.items() if name not in names}

    def forward(self, given):
        return tensors(self.function(**self.rest, **given))


@pytest.mark.parametrize("case", cases(torch.float32, where=leading, functions=True))
def test_a_saved_program_has_the_results_of_eager(case):
    names = [name for name, value in case.arguments.items() if isinstance(value, torch.Tensor)]
    several = case.map_batch(lambda t: torch.cat((t, t.flip(0), t)))
    planned = "self" in case.arguments
    batched = [n for n in names if not planned and n not in case.operator.shared]
    batch, texts = torch.export.Dim("batch"), torch.export.Dim("texts")
    shapes = {n: {0: texts if n.startswith("text") else batch} if n in batched else None for n in names}
    given = {n: case.arguments[n] for n in names}
    program = torch.export.export(Call(case, names), (given,), dynamic_shapes={"given": shapes})
    nodes = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("mlip_kernels.")]
    assert len(nodes) == case.operator.nodes
    assert {node.split(".")[1] for node in nodes} <= set(case.operator.kernels)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for sized in (case,) if planned else (case, several):
        for one, other in zip(exported({n: sized.arguments[n] for n in names}), sized(), strict=True):
            (assert_close if other.is_floating_point() else assert_identical)(one, other)
