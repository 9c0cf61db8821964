"""Every public argument and every kind of wrong value: what is not accepted is refused by name, before anything runs."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from argument_kinds import Tensors, plain, wrong_and_right
from public_calls import CALLS, Call
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mlip_kernels as mk
from mlip_kernels import nn as modules
from mlip_kernels.nn import spectral

ELSEWHERE = {"MergePlan", "use_reference"}
"""Public names without a row: the maps of a plan are checked by their values, and the last takes no argument."""


class Launches(TorchDispatchMode):
    """Which operators of the package run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if operator.namespace.startswith("mlip_kernels"):
            self.names.append(operator.name())
        return operator(*arguments, **(options or {}))


def outcome(call: Call, name: str, value: Any) -> Exception | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call(**{name: value})
        except Exception as failure:
            return failure
    return None


def complaint(call: Call, name: str, label: str, value: Any) -> str | None:
    """What is wrong with the answer to one value, if anything is."""
    valid, kind = call.arguments[name]
    tensor = isinstance(valid, Tensor) and isinstance(value, Tensor) and label not in GENERIC_LABELS
    accepted = (value is None and kind.optional) or kind.accepts(label, value)
    failure = outcome(call, name, value)
    if accepted:
        return failure and f"{label}: refused, but right: {describe(failure)}"
    if failure is None:
        return f"{label}: accepted"
    begins = re.match(rf"(\w+\.)?({'|'.join(call.arguments)})\b", str(failure))
    named = begins and (begins[2] == name or tensor or re.search(rf"\b{name}\b", str(failure)))
    if not named or not isinstance(failure, (TypeError, ValueError)):
        return f"{label}: {describe(failure)}"
    return None


def describe(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure)[:160]}".replace("\n", " | ")
