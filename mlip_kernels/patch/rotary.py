"""Rotary positions of merged tokens: which rotation a token has that stands for several patches."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mlip_kernels.merging import MergePlan
from mlip_kernels.nn.merging_blocks import MergeState


class RotaryTables:
    """The rotary positions of one forward pass, for whatever the patches have become in front of each block.

    A merged token gets the size-weighted mean of the rotations of its patches.

    Args:
        rope: sines and cosines of the patches as timm has them, or None: ``[N, 2d]`` or ``[B, 1, N, 2d]`` for all
            blocks, ``[depth, heads, N, 2d]`` or ``[depth, B, heads, N, 2d]`` for each; d is the width of a head.
        each_block: whether ``rope`` has a table for each block.
        prefix_tokens: leading tokens, which have no rotary position.
    """

    def __init__(self, rope: Tensor | None, *, each_block: bool, prefix_tokens: int) -> None:
        self.rope = rope
        self.each_block = each_block
        self.prefix_tokens = prefix_tokens
        self._followed = 0
        self._whole: MergePlan | None = None
        self._merged: Tensor | None = None

    def __call__(self, index: int, state: MergeState) -> dict[str, Any]:
        """``{"rope": table}`` for the block with this index: timm's own table as long as nothing has merged,
        ``[B, 1 or heads, N' - prefix_tokens, 2d]`` from then on."""
        if self.rope is None:
            return {"rope": None}
        table = self.rope[index] if self.each_block else self.rope
        if not state.plans:
            return {"rope": table}
        plans = state.plans[self._followed :]
        for plan in plans:
            self._whole = plan if self._whole is None else self._whole.then(plan)
        self._followed = len(state.plans)
        if plans or self.each_block:
            assert self._whole is not None
            self._merged = self._mean(table, self._whole)
        return {"rope": self._merged}

    def _mean(self, table: Tensor, plan: MergePlan) -> Tensor:
        """The table for the output tokens of a plan from the tokens before the first block."""
        batch = plan.assignment.shape[0]
        table = table.reshape((1,) * (4 - table.ndim) + table.shape)
        heads, width = table.shape[1], table.shape[3]
        rows = table.transpose(1, 2).flatten(2).expand(batch, -1, -1)
        merged, _ = plan.merge(F.pad(rows, (0, 0, self.prefix_tokens, 0)))
        return merged[:, self.prefix_tokens :].unflatten(2, (heads, width)).transpose(1, 2)
