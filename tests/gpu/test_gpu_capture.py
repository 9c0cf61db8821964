"""No launcher reads a number back, uploads one or waits: each call that has run before can be captured in a CUDA graph.

A launcher runs on tensors that stand for those of a GPU, so whatever it asks of torch is seen here. Of the CUDA
runtime it can ask nothing that waits or copies: a launcher cannot be linked with what ``emulated_cuda/cudart.cpp``
lacks.
"""

from typing import Any

import pytest
import torch
from operators import cases
from promises.test_graph_capture import READS, UPLOADS
from test_gpu_operators import with_kernels
from torch import Tensor

ON_THE_HOST = ("item", "tolist", "numpy", "cpu", "cuda", "__bool__", "__float__", "__int__")
"""Methods of tensors that wait for a GPU. On the CPU some of them never come to the dispatcher."""


@pytest.fixture(params=["triton", "cuda"])
def watched(request, needs_emulated, monkeypatch):
    """An emulated GPU that compiles and does not execute, and notes what launchers ask of the host."""
    needs_emulated(request.param)
    from emulated_cuda import EmulatedCuda

    class Watched(EmulatedCuda):
        touched: list[str]

        def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if self._memory is not None and str(function).startswith((*READS, *UPLOADS)):
                self.touched.append(str(function))
            return super().__torch_dispatch__(function, types, args, kwargs)

    device = Watched(request.param, 90, execute=False)
    device.touched = []

    def noting(name: str, method: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            if device._memory is not None:
                device.touched.append(f"Tensor.{name}")
            return method(*args, **kwargs)

        return noted

    for name in ON_THE_HOST:
        monkeypatch.setattr(Tensor, name, noting(name, getattr(Tensor, name)))
    return device


@pytest.mark.parametrize("case", cases(torch.float32, where=with_kernels))
def test_launchers_touch_nothing_but_the_device(watched, case):
    with watched:
        case.trained(cotangents=case.cotangents())
    assert watched.touched == []
    assert watched.operators or case.sample == "nothing to merge"


def test_what_touches_the_host_is_noticed(watched):
    def launcher(x: Tensor) -> Tensor:
        return x * torch.tensor((1.0, x[0].item(), float(x[1]))) if x.tolist() else x

    with watched:
        watched.run(launcher, torch.ones(3))
    assert {"Tensor.tolist", "Tensor.item", "Tensor.__float__", "aten.lift_fresh.default"} <= set(watched.touched)
