"""Every operator in a CUDA graph, forward and backward, replayed on other values; and on a stream of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from operators import Case

from gpu_check.correctness import table
from gpu_check.record import Recorder
from mlip_kernels.testing import assert_identical


def run(recorder: Recorder, device: torch.device, only: str | None = None) -> None:
    """Record for the first sample of each operator whether a graph and another stream give what a call gives."""
    seen: set[str] = set()
    for name, case in table(device, torch.float32):
        if case.operator.name in seen or (only is not None and only not in name) or not case.operator.kernels:
            continue
        seen.add(case.operator.name)
        with recorder.case(f"{name}: stream") as facts:
            _on_a_stream(case, device)
            facts["right"] = True
        with recorder.case(f"{name}: graph") as facts:
            _in_a_graph(case, device)
            facts["right"] = True


def _on_a_stream(case: Case, device: torch.device) -> None:
    weights = case.cotangents()
    wanted = case.trained(cotangents=weights)
    if device.type != "cuda":
        found = case.trained(cotangents=weights)
    else:
        with _side_stream(device):
            found = case.trained(cotangents=weights)
    _assert_equal(found, wanted)


def _in_a_graph(case: Case, device: torch.device) -> None:
    """The graph reads its inputs where they were: other values there have to give other results, the right ones."""
    weights, others = case.cotangents(), [x.flip(0).clone() for x in case.inputs]
    wanted = case.replace(**dict(zip(case.names, others, strict=True))).trained(cotangents=weights)
    if device.type != "cuda":
        _overwrite(case, others)
        found = case.trained(cotangents=weights)
    else:
        with _side_stream(device):
            case.trained(cotangents=weights)  # compiles, fills caches
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = case.trained(cotangents=weights)
        _overwrite(case, others)
        graph.replay()
        torch.cuda.synchronize(device)
    _assert_equal(found, wanted)


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def _overwrite(case: Case, values: list[torch.Tensor]) -> None:
    for x, value in zip(case.inputs, values, strict=True):
        x.copy_(value)


def _assert_equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert_identical(one, other)
