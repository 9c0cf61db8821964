"""The primitives of token merging as registered operators, and their gradients.

`match` chooses the pairs. `merge` averages the rows that share an output row, `combine` adds them, and `spread` copies
an output row back to its input rows. The last two are the transposes of each other, so each is the gradient of the
other and all three can be differentiated any number of times.

A matching crosses the dispatcher as five tensors; what a sample without a mask does not have is None on the way in, and
a tensor without columns on the way out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlip_kernels._library import define, differentiate, plain_needed
from mlip_kernels.reference import merging as reference
from mlip_kernels.reference.merging import Matching, accumulation_dtype


class Primitives(NamedTuple):
    """What plans are made of and applied by: the registered operators, or plain PyTorch."""

    match: Callable[..., Matching]
    """``(metric, r, guide, guide_weight, prefix_tokens, mask, max_merges, threshold)``; see `reference.match`."""
    merge: Callable[[Tensor, Tensor | None, Matching], tuple[Tensor, Tensor]]
    """``(x, size, matching)``: the mean rows and their sizes; see `reference.merge`. Without sizes, every row is 1."""
    unmerge: Callable[[Tensor, Matching], Tensor]
    """``(y, matching)``; see `reference.unmerge`."""


def primitives() -> Primitives:
    """The registered operators, or plain PyTorch where it was asked for or where it alone can be transformed."""
    return PLAIN if plain_needed() else REGISTERED


# --- match -----------------------------------------------------------------------------------------------------------


def _plain_match(
    metric: Tensor,
    r: int,
    guide: Tensor | None,
    guide_weight: float,
    prefix_tokens: int,
    mask: Tensor | None,
    max_merges: int | None = None,
    threshold: float | None = None,
) -> Matching:
    with torch.no_grad():
        return reference.match(
            metric,
            r,
            guide=guide,
            guide_weight=guide_weight,
            prefix_tokens=prefix_tokens,
            mask=mask,
            max_merges=max_merges,
            threshold=threshold,
        )


def _reference_match(metric: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    assignment, kept, removed, mask, dropped = _plain_match(metric, *arguments)
    nothing = metric.new_empty(metric.shape[0], 0, dtype=torch.bool)
    return (
        assignment,
        kept.clone(),  # these two may be parts of one tensor, which results of an operator must not be
        removed.clone(),
        nothing if mask is None else mask,
        nothing.clone() if dropped is None else dropped,
    )


def _fake_match(
    metric: Tensor,
    r: int,
    guide: Tensor | None,
    guide_weight: float,
    prefix_tokens: int,
    mask: Tensor | None,
    max_merges: int | None = None,
    threshold: float | None = None,
) -> tuple[Tensor, ...]:
    batch, tokens, _ = metric.shape
    rows = [metric.new_empty(batch, count, dtype=torch.int64) for count in (tokens, tokens - r, r)]
    flags = (0, 0) if mask is None else (tokens - r, tokens)
    return *rows, *(metric.new_empty(batch, count, dtype=torch.bool) for count in flags)


_ARGUMENTS = "Tensor metric, SymInt r, Tensor? guide, float guide_weight, SymInt prefix_tokens, Tensor? mask"
_MATCHING = "(Tensor assignment, Tensor kept, Tensor removed, Tensor merged_mask, Tensor dropped)"

_match = define(
    f"merging_match({_ARGUMENTS}) -> {_MATCHING}",
    reference=_reference_match,
    fake=_fake_match,
    triton="mlip_kernels.triton.merging.match:match",
)
_match_capped = define(
    f"merging_match_capped({_ARGUMENTS}, SymInt max_merges) -> {_MATCHING}",
    reference=_reference_match,
    fake=_fake_match,
    kernels=False,
)
_match_above = define(
    f"merging_match_above({_ARGUMENTS}, SymInt? max_merges, float threshold) -> {_MATCHING}",
    reference=_reference_match,
    fake=_fake_match,
    kernels=False,
)


def _registered_match(
    metric: Tensor,
    r: int,
    guide: Tensor | None,
    guide_weight: float,
    prefix_tokens: int,
    mask: Tensor | None,
    max_merges: int | None = None,
    threshold: float | None = None,
) -> Matching:
    r = min(r, (metric.shape[1] - prefix_tokens) // 2)
    if r == 0:
        return _plain_match(metric, r, guide, guide_weight, prefix_tokens, mask)
    guide = None if guide is None or guide_weight == 0 else guide.detach()
    arguments = metric.detach(), r, guide, guide_weight, prefix_tokens, mask
    if threshold is not None:
        maps = _match_above(*arguments, max_merges, threshold)
    else:
        maps = _match(*arguments) if max_merges is None else _match_capped(*arguments, max_merges)
    assignment, kept, removed, merged_mask, dropped = maps
    if mask is None:
        return Matching(assignment, kept, removed, None, None)
    return Matching(assignment, kept, removed, merged_mask, dropped)


# --- merge, combine and spread ---------------------------------------------------------------------------------------

_MAPS = "Tensor assignment, Tensor kept, Tensor removed"


def _plain_merge(x: Tensor, size: Tensor | None, matching: Matching) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        counts = torch.ones_like(matching.assignment, dtype=torch.float32) if size is None else size
        merged_size, weight = reference.merged_sizes(counts, matching, accumulation_dtype(x.dtype))
    return reference.combine(x, weight, matching), merged_size


def _reference_merge(
    x: Tensor,
    size: Tensor | None,
    assignment: Tensor,
    kept: Tensor,
    removed: Tensor,
    mask: Tensor | None,
    dropped: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    matching = Matching(assignment, kept, removed, mask, dropped)
    counts = torch.ones_like(assignment, dtype=torch.float32) if size is None else size
    merged_size, weight = reference.merged_sizes(counts, matching, accumulation_dtype(x.dtype))
    return reference.combine(x, weight, matching), merged_size, weight


def _reference_combine(
    x: Tensor, weight: Tensor | None, assignment: Tensor, kept: Tensor, removed: Tensor, dropped: Tensor | None
) -> Tensor:
    return reference.combine(x, weight, Matching(assignment, kept, removed, None, dropped))


def _reference_spread(
    y: Tensor, weight: Tensor | None, assignment: Tensor, kept: Tensor, removed: Tensor, dropped: Tensor | None
) -> Tensor:
    return reference.spread(y, weight, Matching(assignment, kept, removed, None, dropped))


def _fake_merge(
    x: Tensor, size: Tensor | None, assignment: Tensor, kept: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    merged_size = x.new_empty(kept.shape, dtype=torch.float32)
    weight = x.new_empty(assignment.shape, dtype=accumulation_dtype(x.dtype))
    return x.new_empty(x.shape[0], kept.shape[1], x.shape[2]), merged_size, weight


def _fake_combine(x: Tensor, weight: Tensor | None, assignment: Tensor, kept: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], kept.shape[1], x.shape[2])


def _fake_spread(y: Tensor, weight: Tensor | None, assignment: Tensor, *rest: Any) -> Tensor:
    return y.new_empty(y.shape[0], assignment.shape[1], y.shape[2])


_merge = define(
    f"merging_merge(Tensor x, Tensor? size, {_MAPS}, Tensor? mask, Tensor? dropped)"
    " -> (Tensor merged, Tensor merged_size, Tensor weight)",
    reference=_reference_merge,
    fake=_fake_merge,
    triton="mlip_kernels.triton.merging.merge:merge",
)
_combine = define(
    f"merging_combine(Tensor x, Tensor? weight, {_MAPS}, Tensor? dropped) -> Tensor",
    reference=_reference_combine,
    fake=_fake_combine,
    triton="mlip_kernels.triton.merging.merge:combine",
)
_spread = define(
    f"merging_spread(Tensor y, Tensor? weight, {_MAPS}, Tensor? dropped) -> Tensor",
    reference=_reference_spread,
    fake=_fake_spread,
    triton="mlip_kernels.triton.merging.merge:spread",
)


def _save_merge(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, *maps, _, dropped = inputs
    _, merged_size, weight = output
    ctx.mark_non_differentiable(merged_size, weight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, *maps, dropped)


def _merge_gradients(ctx: Any, grad: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    return None if grad is None else _spread(grad, *ctx.saved_tensors), *(None,) * 6


def _save_maps(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _combine_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _spread(grad, *ctx.saved_tensors), *(None,) * 5


def _spread_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _combine(grad, *ctx.saved_tensors), *(None,) * 5


differentiate("merging_merge", setup_context=_save_merge, backward=_merge_gradients, through=())
differentiate("merging_combine", setup_context=_save_maps, backward=_combine_gradients, through=())
differentiate("merging_spread", setup_context=_save_maps, backward=_spread_gradients, through=())


def _registered_merge(x: Tensor, size: Tensor | None, matching: Matching) -> tuple[Tensor, Tensor]:
    merged, merged_size, _ = _merge(x, size, *matching)
    return merged, merged_size


def _registered_unmerge(y: Tensor, matching: Matching) -> Tensor:
    return _spread(y, None, matching.assignment, matching.kept, matching.removed, matching.dropped)


PLAIN = Primitives(_plain_match, _plain_merge, reference.unmerge)
REGISTERED = Primitives(_registered_match, _registered_merge, _registered_unmerge)
