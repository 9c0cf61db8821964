"""The calls of registered operators that the table of operators ends in, forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from operators import cases, parameters
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Calls = list[tuple[Any, tuple[Any, ...]]]
"""Operators and their arguments."""


class Recorder(TorchDispatchMode):
    """Notes what is called of ``torch.ops.mlip_kernels``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = []

    @property
    def names(self) -> list[str]:
        return [operator._schema.name.partition("::")[2] for operator, _ in self.calls]

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "mlip_kernels":
            self.calls.append((operator, tuple(map(_copied, (*args, *(kwargs or {}).values())))))
        return operator(*args, **(kwargs or {}))


def _copied(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().clone().requires_grad_(argument.requires_grad and torch.is_grad_enabled())


@functools.cache
def recorded_calls() -> Calls:
    """Of all cases in float32, also of those that write into given tensors: each operator with what is optional given
    and left out, with gradients and without."""
    with Recorder() as recorder:
        for parameter in cases(torch.float32):
            (case,) = parameter.values
            results = case()
            case.gradients()
            if "out" in parameters(case.operator):
                case.replace(out=results[0] if len(results) == 1 else results)()
    calls = {}
    for operator, arguments in recorder.calls:
        kind = tuple(a.requires_grad if isinstance(a, Tensor) else a is None for a in arguments)
        calls.setdefault((operator, kind), (operator, arguments))
    return list(calls.values())


def direct_calls() -> list[Any]:
    """`recorded_calls` as parameters ``operator, arguments``."""
    names = (operator._schema.name.partition("::")[2] for operator, _ in recorded_calls())
    return [
        pytest.param(*call, id=f"{number}-{name}")
        for number, (call, name) in enumerate(zip(recorded_calls(), names, strict=True))
    ]
