"""Every public argument and every kind of wrong value: what is not accepted is refused by name, before anything runs.

The rows come from the signatures: a public function or an argument that is new has no row, and fails.
"""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mlip_kernels as mk
from mlip_kernels import models
from mlip_kernels import nn as modules
from mlip_kernels.nn import spectral
from robustness.argument_kinds import GENERIC, Integer, Kind, Number, plain, wrong_and_right
from robustness.public_calls import CALLS as OPERATORS_AND_MODULES
from robustness.public_calls import Call
from robustness.public_models import CALLS as MODELS

ELSEWHERE = {"MergePlan", "use_reference", "MLIPFeatures", "CachedContrastive", "from_open_clip", "to_open_clip"}
"""Public names without a row: the maps of a plan are checked by their values and models part by part, in tests of their
own; the others take or check nothing."""

CALLS = OPERATORS_AND_MODULES | MODELS
VARYING = [
    ("merge_plan", "guide_weight", (0.5, 0.25, 3)),
    ("weighted_mean", "prefix_tokens", (0, 2, 1)),
    ("token_logits", "scale", (1.5, 2.5, 3)),
]
ROWS = [(row, argument) for row, call in CALLS.items() for argument in call.arguments]


class Launches(TorchDispatchMode):
    """Which operators of the package run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if operator.namespace.startswith("mlip_kernels"):
            self.names.append(operator.name())
        return operator(*arguments, **(options or {}))


def failure_of(call: Call, name: str, value: Any) -> Exception | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call(**{name: value})
        except Exception as failure:
            return failure
    return None


def is_named(failure: Exception, call: Call, name: str, *, any_argument: bool) -> bool:
    """Whether an error begins with the argument, or with another one that it has to fit and says so."""
    begins = re.match(rf"(\w+\.)?({'|'.join(call.arguments)})\b", str(failure))
    if begins is None or not isinstance(failure, (TypeError, ValueError)):
        return False
    return any_argument or begins[2] == name or re.search(rf"\b{name}\b", str(failure)) is not None


def complaint(call: Call, name: str, label: str, value: Any) -> str | None:
    """What is wrong with the answer to one value, if anything is."""
    valid, kind = call.arguments[name]
    failure = failure_of(call, name, value)
    shown = f"{type(failure).__name__}: {str(failure)[:160]}".replace("\n", " | ")
    if (value is None and kind.optional) or kind.accepts(label, value):
        return failure and f"{label}: refused, but right: {shown}"
    if failure is None:
        return f"{label}: accepted, but wrong"
    # A tensor of another shape, dtype or device is at odds with the other arguments: either may be blamed.
    variant = isinstance(valid, Tensor) and isinstance(value, Tensor) and label not in GENERIC
    return None if is_named(failure, call, name, any_argument=variant) else f"{label}: {shown}"


def public_signatures() -> dict[str, list[str]]:
    """Every public function, constructor and forward, with its arguments."""
    found = {name: getattr(mk, name) for name in mk.__all__}
    for module in (modules, spectral, models):
        for name in module.__all__:
            found[name] = getattr(module, name)
            if hasattr(found[name], "forward"):
                found[f"{name}.forward"] = found[name].forward
    for name, method in inspect.getmembers(mk.MergePlan, inspect.isfunction):
        if not name.startswith("_"):
            found[f"MergePlan.{name}"] = method
    signatures = {name: inspect.signature(found[name]).parameters for name in found.keys() - ELSEWHERE}
    return {name: [a for a in parameters if a != "self"] for name, parameters in signatures.items()}


def test_every_public_argument_has_a_row():
    for name, arguments in public_signatures().items():
        assert name in CALLS, f"{name} is public and has no row in public_calls.py"
        assert set(CALLS[name].arguments) == set(arguments), name


@pytest.mark.parametrize("row", CALLS)
def test_the_valid_call_is_valid(row):
    CALLS[row]()


@pytest.mark.parametrize(("row", "argument"), ROWS)
def test_wrong_values_are_refused_by_name_and_right_ones_accepted(row, argument):
    valid, kind = CALLS[row].arguments[argument]
    tried = wrong_and_right(valid, kind)
    complaints = [complaint(CALLS[row], argument, label, value) for label, value in tried]
    assert not any(complaints), "\n".join(filter(None, complaints))


@pytest.mark.parametrize("row", CALLS)
def test_what_is_refused_has_launched_and_modified_nothing(row):
    call = CALLS[row]
    given = {name: value for name, (value, _) in call.arguments.items() if isinstance(value, Tensor)}
    before = {name: (value.clone(), value._version) for name, value in given.items()}
    for name, (_, kind) in call.arguments.items():
        for value in (object(), "wrong", torch.eye(2).to_sparse()):
            if kind.accepts("wrong", value):
                continue
            with Launches() as launches:
                assert failure_of(call, name, value) is not None
            assert launches.names == []
    for name, (values, version) in before.items():
        assert torch.equal(given[name], values)
        assert given[name]._version == version


def same(actual: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(actual, expected)
    if isinstance(expected, (list, tuple)):
        return len(actual) == len(expected) and all(map(same, actual, expected))
    if isinstance(expected, dict):
        return same(list(actual.values()), list(expected.values()))
    if isinstance(expected, mk.MergePlan):
        return torch.equal(actual.assignment, expected.assignment)
    return actual == expected


def numbers(kind: type[Kind]) -> list[tuple[str, str]]:
    """Arguments of functions, not of modules, that are numbers of this kind."""
    return [
        (row, argument)
        for row, argument in ROWS
        if isinstance(CALLS[row].arguments[argument][1], kind) and not inspect.isclass(CALLS[row].function)
    ]


@pytest.mark.parametrize("make", [np.int64, np.uint8, np.array, torch.tensor])
@pytest.mark.parametrize(("row", "argument"), numbers(Integer))
def test_integers_of_numpy_and_torch_mean_what_they_say(row, argument, make):
    call = CALLS[row]
    value = call.arguments[argument][0]
    assert same(call(**{argument: make(value)}), call())


@pytest.mark.parametrize("make", [np.float64, np.float32, np.array, torch.tensor])
@pytest.mark.parametrize(("row", "argument"), numbers(Number))
def test_numbers_of_numpy_and_torch_mean_what_they_say(row, argument, make):
    call = CALLS[row]
    value = make(call.arguments[argument][0])
    assert same(call(**{argument: value}), call(**{argument: plain(value)}))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize(("row", "argument"), [pair for pair in ROWS if pair[1] in ("mask", "image_mask", "text_mask")])
def test_a_mask_of_integers_is_the_mask_of_what_is_not_zero(row, argument, dtype):
    call = CALLS[row]
    valid = call.arguments[argument][0]
    mask = torch.arange(valid.numel()).reshape(valid.shape) % 4 != 1
    numbers = torch.where(mask, torch.tensor([1, 2, -1 if dtype.is_signed else 255])[mask.cumsum(1) % 3], 0).to(dtype)
    assert same(call(**{argument: numbers}), call(**{argument: mask}))
    assert not same(call(**{argument: numbers}), call())


@pytest.mark.parametrize(("row", "argument", "values"), VARYING)
def test_checks_trace_numbers_that_vary(row, argument, values):
    torch._dynamo.reset()
    call = CALLS[row]
    tensor_name, tensor = next((n, v) for n, (v, _) in call.arguments.items() if isinstance(v, Tensor))
    padded_in_graphs = "threshold"  # as many rows as any values might need
    left_out = (tensor_name, argument, padded_in_graphs)
    rest = {name: value for name, (value, _) in call.arguments.items() if name not in left_out}

    def function(x: Tensor, value: Any) -> Any:
        result = call.function(**{**rest, tensor_name: x, argument: value})
        return result.assignment if isinstance(result, mk.MergePlan) else result

    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=True)
    for value in values:
        assert same(compiled(tensor, value), function(tensor, value))
