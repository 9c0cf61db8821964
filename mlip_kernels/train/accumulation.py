"""Contrastive training on a batch that is encoded in parts.

A contrastive loss compares every pair with every other, so it cannot be summed over micro-batches. The features of all
micro-batches are computed first, without a graph; the loss of the whole batch gives their gradients; and every
micro-batch is encoded again to carry its part of them to the parameters. The result is that of the whole batch at once,
in the memory of one micro-batch and the features, for nearly two forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mlip_kernels.models import MLIPFeatures


def backward(
    count: int,
    encode: Callable[[int], MLIPFeatures],
    loss: Callable[[MLIPFeatures], dict[str, Tensor]],
    exchange: Callable[[bool], AbstractContextManager],
) -> dict[str, Tensor]:
    """Add the gradient of ``loss`` over ``count`` micro-batches together to the parameters.

    Args:
        count: of micro-batches, at least 1.
        encode: features of the micro-batch of a number, in a graph unless gradients are off. It is called twice for
            all but the last one and has to give the same values, random numbers included.
        loss: terms of a batch, with their sum under ``loss``.
        exchange: context of one backward pass; given True for the last one, in which processes add up gradients.

    Returns:
        The terms of the whole batch.
    """
    last = count - 1
    with torch.no_grad():
        parts = [encode(number) for number in range(last)]
    with exchange(last == 0):
        features = encode(last)
        if last == 0:
            terms = loss(features)
        else:
            learned = [tensor.requires_grad for tensor in _tensors(features)]
            for part in parts:
                for tensor, needs in zip(_tensors(part), learned, strict=True):
                    tensor.requires_grad_(needs)
            terms = loss(_concatenated([*parts, features]))
        terms["loss"].backward()
    for number, part in enumerate(parts):
        with exchange(number == last - 1):
            again = [tensor for tensor in _tensors(encode(number)) if tensor.requires_grad]
            gradients = [tensor.grad for tensor in _tensors(part) if tensor.requires_grad]
            # Zeros also for what has none, the logit scales: processes wait for the gradient of every parameter.
            torch.autograd.backward(
                again,
                [
                    torch.zeros_like(tensor) if gradient is None else gradient
                    for tensor, gradient in zip(again, gradients, strict=True)
                ],
            )
    return {name: term.detach() for name, term in terms.items()}


def _tensors(features: Any) -> list[Tensor]:
    """The tensors in nested tuples and dicts, in a fixed order; one that several terms share comes once."""
    found: dict[int, Tensor] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found[id(value)] = value
        elif isinstance(value, (dict, tuple)):
            for item in value.values() if isinstance(value, dict) else value:
                visit(item)

    visit(features)
    return list(found.values())


def _concatenated(parts: Sequence[Any]) -> Any:
    """Features of the whole batch: rows one after the other; scalars, the logit scales, are those of the last part."""
    last = parts[-1]
    if isinstance(last, Tensor):
        return torch.cat(list(parts)) if last.dim() else last
    if isinstance(last, dict):
        return {name: _concatenated([part[name] for part in parts]) for name in last}
    if isinstance(last, tuple):
        return type(last)(*(_concatenated(values) for values in zip(*parts, strict=True)))
    return last
