"""Times of operators: kernels against eager PyTorch, and either against ``torch.compile`` in another phase."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_check.clock import measure
from gpu_check.record import Recorder
from gpu_check.workloads import Workload, forward, trained, workloads
from mlip_kernels import _library, use_reference

DTYPES = (torch.bfloat16, torch.float32)


def run(recorder: Recorder, device: torch.device, only: str | None = None) -> None:
    """Record the times of kernels and of eager PyTorch, and the bytes a second that a forward pass reaches."""
    for dtype in DTYPES:
        for workload in workloads(device, dtype):
            if only is not None and only not in workload.name:
                continue
            for direction, call in (("forward", forward(workload)), ("forward and backward", trained(workload))):
                if call is None:
                    continue
                with recorder.case(_named(workload, dtype, direction)) as facts:
                    facts |= {"operator": workload.operator, "dtype": str(dtype).removeprefix("torch.")}
                    facts |= {"workload": workload.name, "direction": direction, "arch": _architecture(device)}
                    call()
                    facts["primitives"] = primitives(call)
                    facts["kernels"] = times = measure(call, device)._asdict()
                    if direction == "forward":
                        facts["bytes/s"] = workload.bytes / times["device"]
                    with use_reference():
                        call()
                        facts["eager"] = measure(call, device)._asdict()


def run_compiled(recorder: Recorder, device: torch.device, only: str | None = None) -> None:
    """Record the times of plain PyTorch under ``torch.compile``."""
    for workload in workloads(device, DTYPES[0]):
        if only is not None and only not in workload.name:
            continue

        def plain(*inputs: torch.Tensor, function: Callable[..., object] = workload.function) -> object:
            with use_reference():
                return function(*inputs)

        compiled = torch.compile(plain)
        calls = {
            "forward": torch.no_grad()(lambda w=workload, c=compiled: c(*w.inputs)),
            "forward and backward": trained(workload, compiled),
        }
        for direction, call in calls.items():
            if call is None:
                continue
            with recorder.case(_named(workload, DTYPES[0], direction), seconds=40) as facts:
                call()
                facts["compiled"] = measure(call, device)._asdict()


class _Ran(TorchDispatchMode):
    """Notes which registered operators with GPU kernels run, also inside those that have none of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function.overloadpacket.__name__
        if function.namespace != _library.LIBRARY.ns or _library.has_kernels(name):
            self.names |= {name} if function.namespace == _library.LIBRARY.ns else set()
            return function(*args, **(kwargs or {}))
        with self:
            return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))


def primitives(call: Callable[[], object]) -> list[str]:
    """The registered operators with GPU kernels that a call runs."""
    with _Ran() as ran:
        call()
    return sorted(ran.names)


def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _named(workload: Workload, dtype: torch.dtype, direction: str) -> str:
    return f"{workload.name}, {str(dtype).removeprefix('torch.')}, {direction}"
