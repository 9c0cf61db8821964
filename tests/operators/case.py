"""What a row of the table of operators says, and what promises are tested on: a row with one of its samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import mlip_kernels as mk
from mlip_kernels.testing import assert_as_accurate, assert_close, assert_identical

INTEGER, LINEAR = 0, math.inf
Arguments = dict[str, Any]
"""Arguments of a public function by name, tensors and others."""


@dataclasses.dataclass(frozen=True)
class Operator:
    """A row of the table."""

    name: str
    """As in `mlip_kernels.__all__`, or ``MergePlan.<method>``, or ``<class>.apply``."""
    function: Callable[..., Any]
    samples: Callable[[torch.dtype], dict[str, Arguments]]
    """Small arguments in a dtype, by what is special about them. Their values are those of float32 in float64 too."""
    split: Callable[[torch.dtype], Arguments]
    """Arguments of a size at which kernels divide their work among threads."""
    kernels: tuple[str, ...]
    """The registered operators that a call can run, first the one that is in a graph; none where torch computes."""
    differentiable: tuple[str, ...] = ()
    """Names of the arguments that get gradients wherever they are tensors of numbers."""
    derivatives: float = 1
    """How often the kernels can be differentiated: `LINEAR` always, `INTEGER` where results are numbers of tokens."""
    nodes: int = 1
    """How many of them are in an exported graph."""
    definition: Callable[..., Any] | None = None
    """What is right, where it is not the function itself inside `use_reference`."""
    comparable: Callable[..., Sequence[Tensor]] = lambda *results: results
    """What of the results can be compared, where a value of them can be decided by rounding."""
    largest: Callable[[Arguments], float] | None = None
    """The largest number that is added or subtracted, where a result is a small difference of large numbers."""
    shared: tuple[str, ...] = ()
    """Names of the tensors that have no batch axis in front."""
    per_sample: bool = True
    """Whether every element of the batch is computed alone."""
    rounded_by_autocast: tuple[str, ...] = ()
    """Names of the arguments that autocast rounds; else it changes nothing."""

    @property
    def family(self) -> str:
        return self.function.__module__.split(".")[1]


@dataclasses.dataclass(frozen=True)
class Case:
    """A row with one of its samples: what promises are tested on."""

    operator: Operator
    sample: str
    arguments: Arguments

    @property
    def names(self) -> list[str]:
        """The arguments that have a gradient here."""
        given = ((name, self.arguments.get(name)) for name in self.operator.differentiable)
        return [name for name, value in given if isinstance(value, Tensor) and value.is_floating_point()]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Their values."""
        return tuple(self.arguments[name] for name in self.names)

    def __call__(self, *inputs: Tensor, function: Callable[..., Any] | None = None) -> tuple[Tensor, ...]:
        """All tensors of the result, with other values of `inputs`, and of another function, if given."""
        changed = dict(zip(self.names, inputs or self.inputs, strict=True))
        return tensors((function or self.operator.function)(**{**self.arguments, **changed}))

    def numbers(self, *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
        """The results that are numbers, not indices or truth values: those that can be differentiated."""
        return tuple(y for y in self(*inputs, **options) if y.is_floating_point())

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        """The same with every tensor among the arguments changed, those of a plan too."""
        return dataclasses.replace(self, arguments={name: _map(change, v) for name, v in self.arguments.items()})

    def replace(self, /, **changed: Any) -> Case:
        """The same with other values of some arguments."""
        return dataclasses.replace(self, arguments={**self.arguments, **changed})

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> Case:
        """The same with every tensor changed that has the batch in front."""
        batched = {name: v for name, v in self.arguments.items() if name not in self.operator.shared}
        return self.replace(**dataclasses.replace(self, arguments=batched).map(change).arguments)

    def double(self) -> Case:
        return self.map(lambda t: t.double() if t.is_floating_point() else t)

    def cotangents(self) -> list[Tensor]:
        """Those of `trained`, for calls in which nothing may come from the host."""
        return [cotangent(y, number) for number, y in enumerate(self())]

    def trained(self, *, cotangents: Sequence[Tensor] | None = None, **options: Any) -> list[Tensor]:
        """The results of one recorded call, then gradients of the inputs, in the layout that they are given in.

        Cotangents have values that every dtype represents; they are made here unless given.
        """
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        results = self(*leaves, **options)
        pairs = [
            (y, cotangent(y, number) if cotangents is None else cotangents[number])
            for number, y in enumerate(results)
            if y.requires_grad
        ]
        if not pairs:
            return list(results)
        outputs, weights = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(outputs, leaves, weights, allow_unused=True, materialize_grads=True)
        return [*(y.detach() for y in results), *gradients]

    def gradients(self, **options: Any) -> list[Tensor]:
        """The gradients of `trained`."""
        return self.trained(**options)[-len(self.inputs) :] if self.inputs else []

    def results_and_gradients(self, **options: Any) -> list[Tensor]:
        return [*self(**options), *self.gradients(**options)]

    def comparable(self, **options: Any) -> list[Tensor]:
        """As `results_and_gradients`, of what does not depend on a rounding."""
        return [*self.operator.comparable(*self(**options)), *self.gradients(**options)]

    def reference(self) -> list[Tensor]:
        """As `comparable`, by definition, in plain PyTorch."""
        with mk.use_reference():
            return self.comparable(function=self.operator.definition)


def attempt(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What ``call`` returns, or the error by which it refuses."""
    try:
        return call(), None
    except (NotImplementedError, RuntimeError) as error:
        return None, error


def tensors(results: Any) -> tuple[Tensor, ...]:
    """All tensors of a result, in order; of a plan the maps."""
    if isinstance(results, Tensor):
        return (results,)
    if isinstance(results, mk.MergePlan):
        results = (results.assignment, results.kept, results.removed, results.mask, results.dropped)
    return tuple(tensor for result in results or () for tensor in tensors(result))


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, mk.MergePlan):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return mk.MergePlan(**{name: _map(change, part) for name, part in parts.items()})
    return change(value) if isinstance(value, Tensor) else value


def cotangent(y: Tensor, number: int = 0) -> Tensor:
    """Quarters between -2 and 2 for the result of this number."""
    quarters = torch.randint(-8, 9, y.shape, generator=torch.Generator().manual_seed(30 + number))
    return (quarters / 4).to(y)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def counts(*shape: int, seed: int = 3) -> Tensor:
    """Sizes of merged tokens, 1 to 8."""
    return torch.randint(1, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def first(*lengths: int, tokens: int) -> Tensor:
    """A mask ``[len(lengths), tokens]`` under which that many of each row are real."""
    return torch.arange(tokens) < torch.tensor(lengths)[:, None]


def assert_right(case: Case, found: Sequence[Tensor], name: str = "") -> None:
    """What `Case.comparable` gave is as accurate as PyTorch; indices and truth values are the same."""
    scale = None if case.operator.largest is None else case.operator.largest(case.arguments)
    for number, three in enumerate(zip(found, case.reference(), case.double().reference(), strict=True)):
        actual, baseline, truth = three
        label = f"{name} result or gradient {number} of {case.operator.name}"
        assert (actual.shape, actual.dtype) == (baseline.shape, baseline.dtype), label
        if not actual.is_floating_point():
            assert_identical(actual, baseline, name=label)
        elif actual.dtype == torch.float64:  # its own truth
            assert_close(actual, truth, name=label)
        else:
            assert_as_accurate(actual, baseline, truth, scale=scale, name=label)
