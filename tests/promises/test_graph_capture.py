"""Nothing is read back or uploaded in a call that has run before, as it would stall a stream and break a CUDA graph.

Two looks at every operator, forward and backward: real calls on the CPU, with all of plain PyTorch inside, and calls on
CUDA tensors that are fake, with what the package does on GPUs alone. What the launchers of kernels do is looked at in
``tests/gpu/test_gpu_capture.py``; `make gpu-check` captures graphs.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from operators import cases, cotangent, differentiable, leading
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlip_kernels.spectral import constants

READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.nonzero")
UPLOADS = ("aten.lift_fresh",)
"""What ``torch.tensor`` of numbers ends in."""

VALUES_ARE_CHECKED = {"pair_cross_entropy"}
"""Operators that look at values on the CPU, where it costs nothing; on GPUs they do not."""
VALUES_DECIDE_SHAPES = {"named bands", "threshold"}


class Seen(TorchDispatchMode):
    """Notes which operators touch the host: that read or upload numbers, or have tensors of both devices."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, results = str(function), function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, results)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim() or name.startswith("aten._to_copy")}
        if name.startswith((*READS, *UPLOADS)) or len(devices) > 1:  # a kernel takes a number by value
            self.names.append(name)
        return results


def on_the_device(case: Any) -> bool:
    return case.operator.name not in VALUES_ARE_CHECKED and case.sample not in VALUES_DECIDE_SHAPES


def on_a_gpu(case: Any) -> bool:
    return case.sample not in VALUES_DECIDE_SHAPES


@pytest.mark.parametrize("case", cases(torch.float32, where=on_the_device, functions=True))
def test_a_warm_call_touches_nothing_but_the_device(case):
    cotangents = case.cotangents()
    case.trained(cotangents=cotangents)
    with Seen() as seen:
        case.trained(cotangents=cotangents)
    assert seen.names == []


@pytest.fixture
def fake(monkeypatch):
    """Fake tensors that may be on a GPU, and constants that are there already."""
    mode = FakeTensorMode()

    def remembered(build: Any, parameters: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
        shape = build(*parameters, device=torch.device("cpu")).shape
        with mode:
            return torch.empty(shape, device=device, dtype=dtype)

    monkeypatch.setattr(constants, "_remembered", remembered)
    monkeypatch.setattr(constants, "_only_looked_on", lambda: True)
    with mode:
        yield lambda tensor: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


@pytest.mark.parametrize(
    "case", [*cases(torch.float32, where=on_a_gpu, functions=True), *cases(torch.bfloat16, where=on_a_gpu)]
)
def test_a_call_on_cuda_tensors_touches_nothing_but_the_device(case, fake):
    placed = case.map(fake)
    leaves = [x.detach().requires_grad_() for x in placed.inputs]
    with Seen() as seen:
        results = [y for y in placed(*leaves) if y.requires_grad]
        gradients = differentiated(results, [torch.empty_like(y) for y in results])
    assert seen.names == []
    assert {x.device.type for x in (*results, *gradients.values())} <= {"cuda"}
    assert len(gradients) == len(leaves) or not results


@torch.no_grad()
def differentiated(results: Sequence[Tensor], cotangents: Sequence[Tensor]) -> dict[Any, Tensor]:
    """The gradients of leaves, by their nodes. Autograd's engine asks the driver for devices, so the nodes are called
    here, each after all that lead to it."""
    order: list[Any] = []
    seen: set[Any] = set()

    def visit(node: Any) -> None:
        if node is not None and node not in seen:
            seen.add(node)
            for following, _ in node.next_functions:
                visit(following)
            order.append(node)

    arrived: dict[Any, dict[int, Tensor]] = {}

    def arrive(node: Any, number: int, gradient: Tensor | None) -> None:
        if node is not None and gradient is not None:
            before = arrived.setdefault(node, {}).get(number)
            arrived[node][number] = gradient if before is None else before + gradient

    for result, weights in zip(results, cotangents, strict=True):
        visit(result.grad_fn)
        arrive(result.grad_fn, result.output_nr, weights)
    leaves = {}
    for node in reversed(order):
        given = arrived.pop(node, {})
        if hasattr(node, "variable"):
            leaves |= {node: given[0]} if given else {}
            continue
        if not given:
            continue
        incoming = [given.get(number) for number in range(max(given) + 1)]
        following = node.next_functions
        if isinstance(node, torch.autograd.function.BackwardCFunction):  # it has edges of tensors only
            returned = zip(node.apply(*incoming), node.needs_input_grad, strict=True)
            found = [gradient for gradient, needs in returned if needs]
            following = [edge for edge in following if edge[0] is not None]
        else:
            found = node(*incoming)
        found = found if isinstance(found, (tuple, list)) else (found,)
        for edge, gradient in zip(following, found, strict=True):
            arrive(*edge, gradient)
    return leaves


@pytest.mark.parametrize("case", cases(torch.float32, where=lambda case: leading(case) and differentiable(case)))
def test_nodes_called_here_give_what_the_engine_gives(case):
    leaves = [x.detach().requires_grad_() for x in case.inputs]
    results = [y for y in case(*leaves) if y.requires_grad]
    cotangents = [cotangent(y) for y in results]
    found = {node.variable: gradient for node, gradient in differentiated(results, cotangents).items()}
    expected = torch.autograd.grad(case(*leaves)[: len(results)], leaves, cotangents)
    assert all(torch.equal(found[leaf], gradient) for leaf, gradient in zip(leaves, expected, strict=True))


def test_uploads_and_reads_are_seen():
    with Seen() as seen:
        _ = torch.tensor((1.0, -1.0)) * 2
        _ = torch.ones(1).item()
    assert seen.names == ["aten.lift_fresh.default", "aten._local_scalar_dense.default"]


def test_copies_between_devices_are_seen(fake):
    x = torch.empty(3, device="cuda")
    with Seen() as seen:
        x.cpu()
        x.copy_(torch.zeros(3))
        x * torch.zeros(())
    assert seen.names == ["aten._to_copy.default", "aten.copy_.default"]
