"""Contrastive training on a batch that is encoded in parts.

A contrastive loss compares every pair with every other, so it cannot be summed over micro-batches. The features of all
micro-batches are computed first, without a graph; the loss of the whole batch gives their gradients; and every
micro-batch is encoded again to carry its part of them to the parameters. The result is that of the whole batch at once,
in the memory of one micro-batch and the features, for nearly two forward passes.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


class CachedContrastive:
    """Loss and gradients of a contrastive batch of any size, in the memory of one micro-batch.

        step = CachedContrastive(model, ClipLoss())
        for micro_batches in batches:  # a list of (images, texts)
            loss = step.backward(micro_batches)
            optimizer.step()
            optimizer.zero_grad()

    Gradients are those of the whole batch at once, to rounding: all micro-batches are negatives of each other. Every
    micro-batch but the last is encoded twice, with the same random numbers (dropout, merging by random guides).

    Args:
        model: called as ``model(*part)`` for a micro-batch that is a tuple or list, ``model(**part)`` for a mapping,
            and ``model(part)`` for anything else. It returns a tensor, or a tuple or dict of them (also nested), with
            the batch first; 0-d tensors, such as the logit scale, are those of the last micro-batch. Masks and other
            tensors without gradient are concatenated as they are. May be wrapped by ``DistributedDataParallel``, which
            then exchanges gradients once.
        loss: called as ``loss(*outputs)`` or ``loss(**outputs)`` with the outputs of all micro-batches; returns a
            tensor, or a dict of terms that are summed.
        autocast: makes the context of the model and the loss, as ``lambda: torch.autocast("cuda", torch.bfloat16)``.
            Backward passes run outside of it.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        loss: Callable[..., Any],
        *,
        autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self.model = model
        self.loss = loss
        self.autocast = autocast

    def backward(self, micro_batches: Sequence[Any]) -> Any:
        """Add the gradient of the batch to the parameters.

        Returns:
            What the loss returned, detached.

        Raises:
            ValueError: there is no micro-batch.
        """
        parts = list(micro_batches)
        if not parts:
            raise ValueError("micro_batches: expected at least one, got none")
        states: list[Any] = [None] * len(parts)

        def encode(number: int) -> Any:
            if states[number] is None:
                states[number] = _random_state()
            else:
                _set_random_state(states[number])
            with self.autocast():
                return _called(self.model, parts[number])

        returned: Any = None
        after: Any = None

        def loss(outputs: Any) -> dict[str, Tensor]:
            nonlocal returned, after
            after = _random_state()
            with self.autocast():
                returned = _called(self.loss, outputs)
            terms = returned if isinstance(returned, Mapping) else {"loss": returned}
            return {"loss": functools.reduce(torch.add, terms.values())}

        backward_in_parts(len(parts), encode, loss, self._exchange)
        _set_random_state(after)  # as if every micro-batch had been encoded once
        if isinstance(returned, Mapping):
            return {name: term.detach() for name, term in returned.items()}
        return returned.detach()

    def _exchange(self, now: bool) -> AbstractContextManager:
        unsynchronised = getattr(self.model, "no_sync", None)
        return contextlib.nullcontext() if now or unsynchronised is None else unsynchronised()


def _called(function: Callable[..., Any], arguments: Any) -> Any:
    if isinstance(arguments, Mapping):
        return function(**arguments)
    return function(*arguments) if isinstance(arguments, (tuple, list)) else function(arguments)


def _random_state() -> tuple[Tensor, list[Tensor]]:
    """Of the CPU and of every GPU that is in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def backward_in_parts(
    count: int,
    encode: Callable[[int], Any],
    loss: Callable[[Any], dict[str, Tensor]],
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
        parts = [tree_leaves(encode(number)) for number in range(last)]
    with exchange(last == 0):
        features, structure = tree_flatten(encode(last))
        learned = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in features]
        parts = [[_cached(leaf, needs) for leaf, needs in zip(part, learned, strict=True)] for part in parts]
        whole = [_joined(leaves) for leaves in zip(*parts, features, strict=True)]
        terms = loss(tree_unflatten(whole, structure))
        terms["loss"].backward()
    for number, part in enumerate(parts):
        with exchange(number == last - 1):
            again = [leaf for leaf, needs in zip(tree_leaves(encode(number)), learned, strict=True) if needs]
            cached = [leaf for leaf, needs in zip(part, learned, strict=True) if needs]
            # Zeros also for what has none, the logit scales: processes wait for the gradient of every parameter.
            gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in cached]
            torch.autograd.backward(again, gradients)
    return {name: term.detach() for name, term in terms.items()}


def _cached(leaf: Any, learned: bool) -> Any:
    """What the model returned, as a leaf of the loss's graph; never a parameter, whose gradient would count twice."""
    return leaf.detach().requires_grad_(learned) if isinstance(leaf, Tensor) else leaf


def _joined(leaves: Sequence[Any]) -> Any:
    """Rows of all parts; what has none, as the logit scale, is that of the last part."""
    last = leaves[-1]
    return torch.cat(list(leaves)) if isinstance(last, Tensor) and last.dim() else last
