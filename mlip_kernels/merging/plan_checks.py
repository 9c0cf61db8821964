"""Checks of the maps of a plan that somebody made or loaded: they are addresses of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mlip_kernels._arguments import check_same_device, check_shape, check_tensor, values_known


def check_maps(assignment: Tensor, kept: Tensor, removed: Tensor, mask: Tensor | None, dropped: Tensor | None) -> None:
    """Raise unless the maps are those of a matching: `MergePlan` says what each of them holds.

    Takes O(B·N), and on a GPU one synchronisation. While a graph is traced or captured, only metadata is looked at.

    Raises:
        TypeError, ValueError: naming the map.
    """
    maps = (torch.int64,)
    check_tensor("assignment", assignment, layout="[B, N]", dtypes=maps)
    check_tensor("kept", kept, layout="[B, N']", dtypes=maps)
    check_tensor("removed", removed, layout="[B, N - N']", dtypes=maps)
    (batch, tokens), outputs = assignment.shape, kept.shape[1]
    if kept.shape[0] != batch or outputs > tokens or (outputs == 0 and tokens > 0):
        raise ValueError(f"kept: expected [{batch}, 1 to {tokens}] for {tokens} tokens, got shape {list(kept.shape)}")
    check_shape("removed", removed, (batch, tokens - outputs), "[B, N - N']")
    for name, flags, shape, layout in (
        ("mask", mask, (batch, outputs), "[B, N']"),
        ("dropped", dropped, (batch, tokens), "[B, N]"),
    ):
        if flags is not None:
            check_tensor(name, flags, layout=layout, dtypes=(torch.bool,))
            check_shape(name, flags, shape, layout)
            check_same_device(name, flags, "assignment", assignment)
    for name, rows in (("kept", kept), ("removed", removed)):
        check_same_device(name, rows, "assignment", assignment)
    if values_known(assignment, kept, removed, dropped):
        _check_values(assignment, kept, removed, dropped)


def _check_values(assignment: Tensor, kept: Tensor, removed: Tensor, dropped: Tensor | None) -> None:
    tokens, outputs = assignment.shape[1], kept.shape[1]
    limits = (("assignment", assignment, outputs), ("kept", kept, tokens), ("removed", removed, tokens))
    facts = [((rows >= 0) & (rows < limit)).all() for _, rows, limit in limits]
    # On a GPU nothing may be looked up by a number that is no row, and all facts are fetched at once.
    starts, others = (rows.clamp(0, max(tokens - 1, 0)) for rows in (kept, removed))
    named = torch.zeros_like(assignment, dtype=torch.bool).scatter_(1, torch.cat((starts, others), dim=1), True)
    own = torch.arange(outputs, device=assignment.device)
    facts += [named.all(), (assignment.gather(1, starts) == own).all()]
    if dropped is not None:
        facts.append(~dropped.gather(1, starts).any())
    inside, (every_row, agree, *lasting) = torch.stack(facts).split((3, len(facts) - 3))
    for (name, rows, limit), holds in zip(limits, inside.tolist(), strict=True):
        if not holds:
            wrong = rows[(rows < 0) | (rows >= limit)][0].item()
            raise ValueError(f"{name}: expected row numbers in [0, {limit}), got {wrong}")
    if not every_row:
        raise ValueError(f"kept, removed: expected each of the {tokens} tokens of a sample in one of them, once")
    if not agree:
        raise ValueError("assignment: expected the token kept[b, o] to go to the output token o that starts from it")
    if not all(lasting):
        raise ValueError("dropped: expected no token that is kept")
