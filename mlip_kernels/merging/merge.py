"""Merging by a matching, and back: the mean of the rows that share an output row, and a copy of it for each of them.

`MergeTokens` averages, `CombineTokens` adds, and `UnmergeTokens` copies an output row to its input rows. The last two
are the transposes of each other, so each is the gradient of the other, and all three can be differentiated any number
of times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlip_kernels._arguments import FLOATING, INTEGERS, check_same_device, check_shape, check_tensor
from mlip_kernels._operator import Operator
from mlip_kernels.merging import plain
from mlip_kernels.merging.plain import Matching, accumulation_dtype

COUNTS = (*FLOATING, *INTEGERS)
_MAPS = "Tensor assignment, Tensor kept, Tensor removed"


def check_size(size: object, shape: Any, other_name: str, other: Tensor) -> Tensor:
    """Return ``size`` if it is a ``[B, N]`` of counts that nobody expects a gradient for."""
    counts = check_tensor("size", size, layout="[B, N]", dtypes=COUNTS)
    check_shape("size", counts, shape, "[B, N]")
    check_same_device("size", counts, other_name, other)
    if counts.requires_grad:
        raise ValueError("size: expected counts without gradient, got a tensor that requires one; pass size.detach()")
    return counts


def check_rows(name: str, value: Tensor, assignment: Tensor, rows: int, layout: str) -> None:
    """Raise unless ``value`` has ``rows`` rows for every sample of the plan, on its device."""
    check_tensor(name, value, layout=layout)
    check_shape(name, value, (assignment.shape[0], rows, value.shape[2]), layout)
    check_same_device(name, value, "the plan", assignment)


class MergeTokens(Operator):
    """``MergeTokens.apply(x, size, *plan.maps) -> (merged, merged_size)``: see `MergePlan.merge`.

    ``x`` is ``[B, N, C]``, ``size`` ``[B, N]`` or None. Saved for backward: the maps and the weights, 4·B·N bytes.
    """

    schema = (
        f"merging_merge(Tensor x, Tensor? size, {_MAPS}, Tensor? mask, Tensor? dropped)"
        " -> (Tensor merged, Tensor merged_size, Tensor weight)"
    )
    triton = "mlip_kernels.triton.merging.merge:merge"
    results, differentiable = 2, 1

    @staticmethod
    def check(
        x: Tensor,
        size: Tensor | None,
        assignment: Tensor,
        kept: Tensor,
        removed: Tensor,
        mask: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> tuple[Any, ...]:
        check_rows("x", x, assignment, assignment.shape[1], "[B, N, C]")
        if size is not None:
            size = check_size(size, assignment.shape, "x", x).to(torch.float32)
        return x, size, assignment, kept, removed, mask, dropped

    @staticmethod
    def compute(
        x: Tensor,
        size: Tensor | None,
        assignment: Tensor,
        kept: Tensor,
        removed: Tensor,
        mask: Tensor | None,
        dropped: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        matching = Matching(assignment, kept, removed, mask, dropped)
        with torch.no_grad():
            counts = torch.ones_like(assignment, dtype=torch.float32) if size is None else size
            merged_size, weight = plain.merged_sizes(counts, matching, accumulation_dtype(x.dtype))
        return plain.combine(x, weight, matching), merged_size, weight

    @staticmethod
    def fake(
        x: Tensor, size: Tensor | None, assignment: Tensor, kept: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        merged_size = x.new_empty(kept.shape, dtype=torch.float32)
        weight = x.new_empty(assignment.shape, dtype=accumulation_dtype(x.dtype))
        return x.new_empty(x.shape[0], kept.shape[1], x.shape[2]), merged_size, weight

    @staticmethod
    def plain(*arguments: Any) -> tuple[Tensor, Tensor]:
        merged, merged_size, _ = _compute_merge(*arguments)
        return merged, merged_size

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, _, *maps, _, dropped = inputs
        ctx.save_for_backward(output[2], *maps, dropped)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor | None, *rest: Any) -> Tensor | None:
        return None if grad is None else _unmerge(grad, *ctx.saved_tensors)


class UnmergeTokens(Operator):
    """``UnmergeTokens.apply(y, *plan.maps)``: see `MergePlan.unmerge`. ``y`` is ``[B, N', C]``; the maps are saved.

    The operator itself can weigh the copies: it is the gradient of `MergeTokens`, too.
    """

    schema = f"merging_spread(Tensor y, Tensor? weight, {_MAPS}, Tensor? dropped) -> Tensor"
    triton = "mlip_kernels.triton.merging.merge:spread"

    @staticmethod
    def check(
        y: Tensor,
        assignment: Tensor,
        kept: Tensor,
        removed: Tensor,
        mask: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> tuple[Any, ...]:
        check_rows("y", y, assignment, kept.shape[1], "[B, N', C]")
        return y, None, assignment, kept, removed, dropped

    @staticmethod
    def compute(
        y: Tensor, weight: Tensor | None, assignment: Tensor, kept: Tensor, removed: Tensor, dropped: Tensor | None
    ) -> Tensor:
        return plain.spread(y, weight, Matching(assignment, kept, removed, None, dropped))

    plain = compute

    @staticmethod
    def fake(y: Tensor, weight: Tensor | None, assignment: Tensor, *rest: Any) -> Tensor:
        return y.new_empty(y.shape[0], assignment.shape[1], y.shape[2])

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Tensor:
        return _combine(grad, *ctx.saved_tensors)


class CombineTokens(Operator):
    """``CombineTokens.apply(x, weight, assignment, kept, removed, dropped)``: weighted sums of rows."""

    schema = f"merging_combine(Tensor x, Tensor? weight, {_MAPS}, Tensor? dropped) -> Tensor"
    triton = "mlip_kernels.triton.merging.merge:combine"
    save = UnmergeTokens.save

    @staticmethod
    def compute(
        x: Tensor, weight: Tensor | None, assignment: Tensor, kept: Tensor, removed: Tensor, dropped: Tensor | None
    ) -> Tensor:
        return plain.combine(x, weight, Matching(assignment, kept, removed, None, dropped))

    plain = compute

    @staticmethod
    def fake(x: Tensor, weight: Tensor | None, assignment: Tensor, kept: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(x.shape[0], kept.shape[1], x.shape[2])

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Tensor:
        return _unmerge(grad, *ctx.saved_tensors)


_compute_merge, _unmerge, _combine = MergeTokens.compute, UnmergeTokens.run, CombineTokens.run
merge_rows, unmerge_rows = MergeTokens.call, UnmergeTokens.call
