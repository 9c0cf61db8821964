"""Kernel against reference against float64: the result, its gradients, its inputs afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import mlip_kernels as mk
from mlip_kernels.testing import epsilon
from robustness.cases import Case
from robustness.draws import Draw

SENSITIVITY = 16
"""How many times the effect of a last bit in every input an error may have, beside twice that of the reference.

It stands alone for float64, where the reference is the truth that it is measured by, and has an error of its own.
"""


def run(case: Case, draw: Draw) -> None:
    """Raise AssertionError, or whatever the call raises, unless everything that is promised of it holds."""
    call = case.call or getattr(mk, case.operator)
    definition = case.definition or case.call or getattr(mk, case.operator)
    arguments = dict(case.arguments)
    out = arguments.pop("out", None)
    before = {name: _snapshot(value) for name, value in arguments.items()}

    found = _results(call, arguments)
    _unchanged(arguments, before)
    with mk.use_reference():
        baseline = _results(definition, arguments)
        widened = {name: _wide(value) for name, value in arguments.items()}
        truth = _results(definition, widened)
        shaken = _results(definition, _shaken(widened, arguments, draw))
    precision = arithmetic(next(value for value in arguments.values() if isinstance(value, Tensor)))
    _compare("result", found, baseline, truth, shaken, precision * case.scale)
    if out is not None:
        if call(**arguments, out=out) is not out:
            raise AssertionError("out: another tensor came back")
        _same("out", out, found[0])
        _unchanged(arguments, before)
    if case.per_sample:
        _samples_are_apart(call, arguments, draw)

    if case.gradients:
        shapes = [result.shape for result in found if result.is_floating_point()]
        cotangents = [torch.randn(shape, generator=draw.generator, dtype=torch.float64) for shape in shapes]
        actual = _gradients(call, arguments, case.gradients, cotangents)
        _unchanged(arguments, before)
        with mk.use_reference():
            plain = _gradients(definition, arguments, case.gradients, cotangents)
            # Cotangents as they are after rounding to the dtype of the results.
            exact = [
                c.to(r.dtype).double()
                for c, r in zip(cotangents, [r for r in found if r.is_floating_point()], strict=True)
            ]
            right = _gradients(definition, widened, case.gradients, exact)
            moved = [_moved(c, precision, draw) for c in exact]
            near = _gradients(definition, _shaken(widened, arguments, draw), case.gradients, moved)
        largest = max((float(c.abs().max()) for c in cotangents if c.numel()), default=0.0)
        _compare("gradient", actual, plain, right, near, precision * case.gradient_scale * largest, case.gradients)


def arithmetic(x: Tensor) -> float:
    """The rounding of what is computed inside: in float64 for float64, else in float32."""
    return epsilon(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _results(call: Callable[..., Any], arguments: dict[str, Any]) -> list[Tensor]:
    results = call(**arguments)
    return [results] if isinstance(results, Tensor) else list(results)


def _gradients(
    call: Callable[..., Any], arguments: dict[str, Any], names: Sequence[str], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    # Detached, not cloned: the gradient sees the layout that the forward pass saw.
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    results = [result for result in _results(call, {**arguments, **leaves}) if result.is_floating_point()]
    pairs = [(r, c.to(r.dtype)) for r, c in zip(results, cotangents, strict=True) if r.requires_grad]
    if not pairs:
        raise AssertionError("no result requires a gradient")
    outputs, given = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, list(leaves.values()), given, allow_unused=True, materialize_grads=True))


def _compare(
    what: str,
    found: Sequence[Tensor],
    baseline: Sequence[Tensor],
    truth: Sequence[Tensor],
    shaken: Sequence[Tensor],
    cancelled: float,
    names: Sequence[str] = (),
) -> None:
    for place, (a, b, t, s) in enumerate(zip(found, baseline, truth, shaken, strict=True)):
        name = f"{what} {names[place] if names else place}"
        if a.shape != b.shape or a.dtype != b.dtype:
            raise AssertionError(
                f"{name}: {a.dtype} {list(a.shape)}, where the reference has {b.dtype} {list(b.shape)}"
            )
        if not a.is_floating_point():
            _same(name, a, b)
            continue
        limit = 0.99 * torch.finfo(a.dtype).max
        a, b, t, s = (each.detach().double() for each in (a, b, t, s))
        inside = t.abs() <= limit
        beyond = t.abs() > limit
        if not bool((a[beyond].abs() >= limit).all()):
            raise AssertionError(f"{name}: finite where the truth is beyond the range")
        if not bool(a[inside].isfinite().all()):
            raise AssertionError(f"{name}: {int((~a[inside].isfinite()).sum())} values not finite where the truth is")
        if not bool(inside.any()):
            continue
        rounding, scale = epsilon(found[place].dtype), float(t[inside].abs().max())
        steps = torch.nn.functional.relu((s - t)[inside].abs().nan_to_num(0)).max()
        theirs = (b - t)[inside].abs().nan_to_num(0).max()
        floor = 64 * torch.finfo(found[place].dtype).tiny * 2 * rounding  # 64 steps among the numbers next to 0
        allowed = 2 * float(theirs) + SENSITIVITY * float(steps) + 4 * rounding * scale + 8 * cancelled + floor
        worst = float((a - t)[inside].abs().max())
        if worst > allowed:
            raise AssertionError(
                f"{name}: error {worst:.3g}, allowed {allowed:.3g} (the reference's {float(theirs):.3g})"
            )


def _same(name: str, actual: Tensor, expected: Tensor) -> None:
    equal = (
        actual.isnan() & expected.isnan() if actual.is_floating_point() else torch.zeros(actual.shape, dtype=torch.bool)
    )
    if actual.dtype == torch.bool:
        actual, expected = actual.to(torch.uint8) != 0, expected.to(torch.uint8) != 0
    if not bool((equal | (actual == expected)).all()):
        raise AssertionError(f"{name}: differs in {int((~(equal | (actual == expected))).sum())} places")


def _samples_are_apart(call: Callable[..., Any], arguments: dict[str, Any], draw: Draw) -> None:
    """NaN in one sample leaves the bits of all others alone."""
    name = next(name for name, value in arguments.items() if isinstance(value, Tensor))
    whole = arguments[name].clone(memory_format=torch.contiguous_format)
    if whole.shape[0] < 2:
        return
    spoilt = whole.clone()
    victim = draw.random.randrange(len(whole))
    spoilt[victim] = draw.choice((torch.nan, torch.inf, 0.0))
    others = [sample for sample in range(len(whole)) if sample != victim]
    expected, found = (_results(call, {**arguments, name: tokens}) for tokens in (whole, spoilt))
    for place, (now, then) in enumerate(zip(found, expected, strict=True)):
        _same(f"result {place} of samples beside a spoilt one", now[others], then[others])


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _shaken(widened: dict[str, Any], arguments: dict[str, Any], draw: Draw) -> dict[str, Any]:
    """Every number moved by its last bit in the arithmetic: of float32, or of float64 for what is given in it."""
    if draw.values == "integers" and "image_tokens" in arguments:
        return widened  # chance would decide ties
    moved = {}
    for name, value in widened.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            moved[name] = value
            continue
        moved[name] = _moved(value, arithmetic(arguments[name]), draw)
    return moved


def _moved(value: Tensor, rounding: float, draw: Draw) -> Tensor:
    return value * (1 + 2 * rounding * (torch.randint(0, 2, value.shape, generator=draw.generator).double() * 2 - 1))


def _snapshot(value: Any) -> Any:
    return (value.clone(), value._version) if isinstance(value, Tensor) else value


def _unchanged(arguments: dict[str, Any], before: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            was, version = before[name]
            if value._version != version:
                raise AssertionError(f"{name}: was written to")
            _same(f"{name} after the call", value, was)
