"""Schedules: how many tokens to merge in which block, from the compression that is wanted.

Counts are of patch tokens, prefix tokens not included; a schedule is a list with one r per block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlip_kernels._arguments import (
    LARGEST_SIZE,
    check_flag,
    check_integer,
    check_integers,
    check_number,
    sequence_of,
    shown,
)


def merge_layers(depth: int) -> tuple[int, ...]:
    """The blocks, counted from 0, that merge by default: at a quarter, a half and three quarters of the depth.

    With 12 blocks these are 3, 6 and 9, the fourth, seventh and tenth (Liang et al., "EViT", ICLR 2022). Fewer than
    three blocks merge where the depth is below three.
    """
    depth = _check_depth(depth)
    return tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))


def keep_rate_schedule(
    keep_rate: float,
    tokens: int,
    depth: int,
    *,
    layers: Sequence[int] | None = None,
    overall: bool = False,
) -> list[int]:
    """r per block such that a wanted share of the patch tokens is kept.

    Args:
        keep_rate: share of tokens kept, in (0, 1]; 1 merges nothing. By default the share of what comes in that every
            merging block keeps: ``n`` tokens become ``ceil(keep_rate · n)``, EViT's rule. 196 tokens at 0.7 become
            138, 97 and 68.
        tokens: patch tokens before the first block, at least 1.
        depth: number of blocks.
        layers: the blocks that merge, counted from 0; `merge_layers` if None.
        overall: take ``keep_rate`` as the share kept at the end: ``ceil(keep_rate · tokens)`` tokens are left, and
            every merging block keeps about the same share.

    Returns:
        ``depth`` integers, 0 for blocks that do not merge; no r exceeds half of the tokens that come in.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range; or the rate cannot be reached, as one merging
            step removes at most half of the tokens: below 0.5, or below ``0.5 ** len(layers)`` overall.
    """
    depth = _check_depth(depth)
    tokens = check_integer("tokens", tokens, minimum=1, maximum=LARGEST_SIZE)
    keep_rate = check_number("keep_rate", keep_rate)
    overall = check_flag("overall", overall)
    if not 0 < keep_rate <= 1:
        raise ValueError(f"keep_rate: expected a number in (0, 1], got {keep_rate}")
    merging = _check_layers(merge_layers(depth) if layers is None else layers, depth)
    lowest = 0.5 ** (len(merging) if overall else 1)
    if keep_rate < lowest and merging:
        steps = f"{len(merging)} merging blocks keep" if overall else "a merging block keeps"
        raise ValueError(f"keep_rate: {steps} at least {lowest:g} of the tokens, got {keep_rate}")
    if keep_rate < 1 and overall and not merging:
        raise ValueError(f"layers: expected a block to merge in for an overall keep_rate of {keep_rate}, got none")

    schedule, left = [0] * depth, tokens
    for step, layer in enumerate(merging, start=1):
        kept = _ceil(tokens * keep_rate ** (step / len(merging)) if overall else left * keep_rate)
        schedule[layer] = left - kept
        left = kept
    return schedule


def merge_schedule(r: int | tuple[int, float] | Sequence[int], depth: int) -> list[int]:
    """r per block from the forms in which ToMe takes it.

    * an integer: the same r in every block;
    * a tuple ``(r, inflection)``, inflection in [−1, 1]: r rises linearly over the blocks (1), falls (−1) or stays (0)
      with about the same total; from ``r · (1 − inflection)`` to ``r · (1 + inflection)``, cut to integers;
    * a list: r of every block, continued with zeros; it may not be longer than the depth.

    A tuple is always a pair, a list always one r per block. What a block cannot merge, `merge_plan` clamps.
    """
    depth = _check_depth(depth)
    if isinstance(r, tuple):
        if len(r) != 2:
            raise ValueError(f"r: expected a pair (r, inflection), a list or an integer, got {shown(r)}")
        each, inflection = check_integer("r[0]", r[0], minimum=0), check_number("r[1]", r[1], minimum=-1.0, maximum=1.0)
    elif sequence_of(r) is not None:
        given = check_integers("r", r, minimum=0)
        if len(given) > depth:
            raise ValueError(f"r: expected at most one entry for each of the {depth} blocks, got {len(given)}")
        return given + [0] * (depth - len(given))
    else:
        each, inflection = check_integer("r", r, minimum=0), 0.0
    if depth == 1:
        return [each]
    first = int(each * (1.0 - inflection))
    slope = 2 * (each - first) / (depth - 1)
    return [int(first + slope * block) for block in range(depth)]


def token_counts(schedule: Sequence[int], tokens: int) -> list[int]:
    """Patch tokens left behind every block: each removes its r, but never more than half of what comes in."""
    left = check_integer("tokens", tokens, minimum=0, maximum=LARGEST_SIZE)
    counts = []
    for r in check_integers("schedule", schedule, minimum=0):
        left -= min(r, left // 2)
        counts.append(left)
    return counts


def _check_depth(depth: object) -> int:
    return check_integer("depth", depth, minimum=1, maximum=LARGEST_SIZE)


def _check_layers(layers: Sequence[int], depth: int) -> list[int]:
    merging = check_integers("layers", layers, minimum=0, maximum=depth - 1)
    if sorted(set(merging)) != merging:
        raise ValueError(f"layers: expected ascending numbers of different blocks, got {list(layers)}")
    return merging


def _ceil(count: float) -> int:
    """``ceil`` that takes 55.00000000000001, which is 0.55 · 100 in floating point, for the 55 it stands for."""
    return math.ceil(round(count, 9))
