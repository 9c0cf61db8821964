"""Token logits of this rank's images with the texts of all ranks, whose tokens go around the ring.

Forward and backward each send every rank's shard of texts once around. What backward needs of a remote shard is
computed again when it passes, so that nothing of it stays: no tokens, no argmax maps. The gradient of a shard travels
with it, in float32, and gathers on the way what each rank adds; the order of the ring makes the sum deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlip_kernels._operator import reference_requested, use_reference
from mlip_kernels.contrastive.token_logits import token_logits
from mlip_kernels.nn.losses.ring import pass_on


@dataclass(frozen=True)
class Shards:
    """How the texts are spread over the ranks: texts ``rows[r]``, each of ``lengths[r]`` tokens, on rank r."""

    rows: Sequence[int]
    lengths: Sequence[int]

    def of(self, rank: int) -> slice:
        """The place of a rank's texts among all."""
        first = sum(self.rows[:rank])
        return slice(first, first + self.rows[rank])


def ring_logits(
    shards: Shards,
    gradient: str,
    text_tokens: Tensor,
    text_weight: Tensor | None,
    text_mask: Tensor | None,
    image_tokens: Tensor,
    image_weight: Tensor | None,
    image_mask: Tensor | None,
    scale: Tensor | float,
    bias: Tensor | float | None,
) -> tuple[Tensor, Tensor]:
    """`token_logits` of this rank's images with all texts: ``[own images, all texts]`` and ``[all texts, own images]``.

    ``gradient`` is ``"all"``, or ``"local"`` where texts get only what their own rank computed.
    """
    texts, images = (text_tokens, text_weight, text_mask), (image_tokens, image_weight, image_mask)
    return _RingLogits.apply(shards, gradient, *texts, *images, scale, bias)


class _RingLogits(torch.autograd.Function):
    @staticmethod
    def forward(shards: Shards, gradient: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        images = arguments[3]
        dtype, total = _wide(images), sum(shards.rows)
        per_image = images.new_empty(images.shape[0], total, dtype=dtype)
        per_text = images.new_empty(total, images.shape[0], dtype=dtype)
        for owner, shard in _passing(shards, arguments[:3]):
            here = shards.of(owner)
            per_image[:, here], per_text[here] = ordered_logits(*shard, *arguments[3:])
        return per_image, per_text

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.shards, ctx.gradient, *arguments = inputs
        ctx.on_reference = reference_requested()
        ctx.numbers = [None if isinstance(argument, Tensor) else argument for argument in arguments]
        ctx.save_for_backward(*(argument if isinstance(argument, Tensor) else None for argument in arguments))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_image: Tensor, grad_text: Tensor) -> tuple[Tensor | None, ...]:
        rank, everywhere = dist.get_rank(), ctx.gradient == "all"
        saved = [n if t is None else t for t, n in zip(ctx.saved_tensors, ctx.numbers, strict=True)]
        needed = [i for i, wanted in enumerate(ctx.needs_input_grad[2:]) if wanted]
        sums = [torch.zeros_like(saved[i], dtype=_wide(saved[i])) for i in needed]
        moving = sum(i < 3 for i in needed)  # the first three arguments are those of the texts
        travelling, staying = sums[:moving], sums[moving:]

        for owner, shard in _passing(ctx.shards, saved[:3]):
            if everywhere and owner != rank:
                travelling = _pass_on(ctx.shards, owner, travelling)
            here = ctx.shards.of(owner)
            totals = [*(travelling if everywhere or owner == rank else [None] * moving), *staying]
            with use_reference() if ctx.on_reference else nullcontext():
                _add(totals, _gradients([*shard, *saved[3:]], needed, grad_image[:, here], grad_text[here]))
        if everywhere:
            travelling = _pass_on(ctx.shards, rank, travelling)

        result: list[Tensor | None] = [None] * len(saved)
        for i, total in zip(needed, [*travelling, *staying], strict=True):
            result[i] = total.to(saved[i].dtype)
        return None, None, *result


def _passing(shards: Shards, own: Sequence[Any]) -> Iterator[tuple[int, list[Any]]]:
    """The shard of each rank with the number of the rank, one's own first, then against the direction of travel."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    held = [t for t in own if t is not None]
    for step in range(ranks):
        owner = (rank - step) % ranks
        if step:
            held = _pass_on(shards, owner, held)
        arrived = iter(held)
        yield owner, [None if t is None else next(arrived) for t in own]


def _pass_on(shards: Shards, owner: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Send the next rank what this one holds of some shard, and receive the same of the shard of ``owner``."""
    shapes = [(shards.rows[owner], shards.lengths[owner], *t.shape[2:]) for t in tensors]
    return pass_on(tensors, shapes, [1] * len(tensors))


def _gradients(arguments: list[Any], needed: list[int], *cotangents: Tensor) -> Sequence[Tensor]:
    """Gradients of the ``needed`` arguments of `ordered_logits`, from nothing but the arguments."""
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    leaves = [arguments[i].requires_grad_() for i in needed]
    with torch.enable_grad():
        logits = ordered_logits(*arguments)
    return torch.autograd.grad(logits, leaves, cotangents, allow_unused=True, materialize_grads=True)


def ordered_logits(
    text_tokens: Tensor,
    text_weight: Tensor | None,
    text_mask: Tensor | None,
    image_tokens: Tensor,
    image_weight: Tensor | None,
    image_mask: Tensor | None,
    scale: Tensor | float,
    bias: Tensor | float | None,
) -> tuple[Tensor, Tensor]:
    """`token_logits` with its arguments in the order of `ring_logits`."""
    return token_logits(
        image_tokens,
        text_tokens,
        image_mask=image_mask,
        text_mask=text_mask,
        image_weight=image_weight,
        text_weight=text_weight,
        scale=scale,
        bias=bias,
    )


def _add(totals: Sequence[Tensor | None], parts: Sequence[Tensor]) -> None:
    for total, part in zip(totals, parts, strict=True):
        if total is not None:
            total += part


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
