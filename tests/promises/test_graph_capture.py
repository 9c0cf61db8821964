"""Nothing is read back or uploaded in a call that has run before, as it would stall a stream and break a CUDA graph."""

from typing import Any

import pytest
import torch
from operators import cases
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.nonzero")
UPLOADS = ("aten.lift_fresh",)
"""What ``torch.tensor`` of numbers ends in."""

VALUES_ARE_CHECKED = {"pair_cross_entropy"}
"""Operators that look at values on the CPU, where it costs nothing; on GPUs they do not."""
VALUES_DECIDE_SHAPES = {"named bands", "threshold"}


class Seen(TorchDispatchMode):
    """Notes which operators touch the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(function)
        if name.startswith((*READS, *UPLOADS)):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def on_the_device(case: Any) -> bool:
    return case.operator.name not in VALUES_ARE_CHECKED and case.sample not in VALUES_DECIDE_SHAPES


@pytest.mark.parametrize("case", cases(torch.float32, where=on_the_device, functions=True))
def test_a_warm_call_touches_nothing_but_the_device(case):
    cotangents = case.cotangents()
    case.trained(cotangents=cotangents)
    with Seen() as seen:
        case.trained(cotangents=cotangents)
    assert seen.names == []


def test_uploads_and_reads_are_seen():
    with Seen() as seen:
        _ = torch.tensor((1.0, -1.0)) * 2
        _ = torch.ones(1).item()
    assert seen.names == ["aten.lift_fresh.default", "aten._local_scalar_dense.default"]
