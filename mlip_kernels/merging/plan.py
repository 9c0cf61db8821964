"""Token merging: a plan of which tokens to merge, and the merging itself.

A plan is computed once from similarities (and, if wanted, a guide) and applied to any number of tensors: the tokens,
their positions, tokens of another branch. It holds row numbers, O(N) of them, never a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_kernels._arguments import (
    check_integer,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
    check_tokens,
    values_known,
)
from mlip_kernels._tracing import stable_argsort
from mlip_kernels.merging import plain
from mlip_kernels.merging.match import check_matching, extended, match, match_above
from mlip_kernels.merging.merge import check_rows, check_size, merge_rows, unmerge_rows


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Which tokens merge, of N = `tokens` into N' = `merged_tokens`; made by `merge_plan`.

    Output order: prefix tokens, unmerged sources, targets, padding, each ascending; with ``r == 0`` nothing moves.
    `in_original_order` is the same plan in the order of the input.
    All tensors lie on the device of the metric. A plan can be pickled, and crosses ``torch.compile`` and
    ``torch.utils.checkpoint``.

    Its maps are addresses. A plan that you make, copy or load is checked once, in O(B·N) and on a GPU with one
    synchronisation, except while something is traced or captured; what changes the tensors of a plan later on can make
    results meaningless, but reads and writes no other memory.

    Raises:
        TypeError, ValueError: a map has the wrong type, dtype, shape or device, or names rows that are not there;
            ``kept`` and ``removed`` do not name every input token once; ``assignment`` does not send a kept token to
            the output token that starts from it; or a kept token is dropped.
    """

    assignment: Tensor
    """``[B, N]`` int64, the source map: the output token that every input token went to. N + `padding` columns."""
    kept: Tensor
    """``[B, N']`` int64: the input token that every output token starts from."""
    removed: Tensor
    """``[B, r]`` int64: padding that was dropped, then the input tokens merged into another one, each ascending."""
    prefix_tokens: int
    """Number of leading tokens that never merge."""
    mask: Tensor | None = None
    """``[B, N']`` bool, True where the output token is real; None if the plan was made without a mask."""
    dropped: Tensor | None = None
    """``[B, N]`` bool, True for masked input tokens that have no output token any more; None without a mask."""
    size: Tensor | None = None
    """``[B, N]`` float32: the sizes `merge` uses if it is given none; None means ones."""
    padding: int = 0
    """Rows of padding that `merge` appends to its input, where samples merge different numbers of tokens (``threshold``
    of `merge_plan`). The maps, `dropped` and `size` count them as tokens N, N + 1, …, whose mask is False."""

    def __post_init__(self) -> None:
        check_maps(self.assignment, self.kept, self.removed, self.mask, self.dropped)
        check_integer("padding", self.padding, minimum=0, maximum=self.assignment.shape[1])
        check_integer("prefix_tokens", self.prefix_tokens, minimum=0, maximum=self.tokens)
        if self.size is not None:
            check_size(self.size, self.assignment.shape, "assignment", self.assignment)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @classmethod
    def _made(
        cls,
        assignment: Tensor,
        kept: Tensor,
        removed: Tensor,
        prefix_tokens: int,
        mask: Tensor | None = None,
        dropped: Tensor | None = None,
        size: Tensor | None = None,
        padding: int = 0,
    ) -> MergePlan:
        """A plan of maps that are right because they come from a matching: nobody has to look at them."""
        plan = object.__new__(cls)
        values = assignment, kept, removed, prefix_tokens, mask, dropped, size, padding
        for name, value in zip(_FIELDS, values, strict=True):
            object.__setattr__(plan, name, value)
        return plan

    @property
    def tokens(self) -> int:
        """Number of input tokens N, prefix and masked ones included."""
        return self.assignment.shape[1] - self.padding

    @property
    def merged_tokens(self) -> int:
        """Number of output tokens N' = N − r, prefix and padding included."""
        return self.kept.shape[1]

    @property
    def r(self) -> int:
        """By how many tokens the sequence gets shorter: the r that was asked for, after its clamp and its threshold."""
        return self.tokens - self.merged_tokens

    @property
    def maps(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """``(assignment, kept, removed, mask, dropped)``: what `functions.MergeTokens` and its inverse take."""
        return self.assignment, self.kept, self.removed, self.mask, self.dropped

    @property
    def positions(self) -> Tensor:
        """``[B, N']`` int64: the input token that each output token starts from, always a row of the input.

        Where `mask` is False it says nothing. ``positional.gather(1, ...)`` with it is the row of a table for every
        output token; the mean over all tokens that it stands for is ``plan.merge(positional)``.
        """
        return self.kept.clamp(max=self.tokens - 1) if self.padding else self.kept

    def original_order(self) -> Tensor:
        """``[B, N']`` int64: the output tokens sorted by where they start in the input, padding at the end.

        ``y.gather(1, order[..., None].expand_as(y))`` sorts merged tokens; `in_original_order` is the plan for them.
        """
        key = self.kept
        if self.mask is not None:
            behind = torch.arange(self.merged_tokens, device=key.device) >= self.prefix_tokens
            key = key + self.assignment.shape[1] * (behind & ~self.mask)
        return stable_argsort(key)

    def in_original_order(self) -> MergePlan:
        """The same merges, with output tokens in the order of the input tokens they start from.

        A target keeps its place and tokens that merged into it are gone, so that rows of an image stay rows: what dense
        heads and causal layers need. Prefix tokens stay first, padding stays last.
        """
        order = self.original_order()
        return self._made(
            assignment=order.argsort(dim=1).gather(1, self.assignment),
            kept=self.kept.gather(1, order),
            removed=self.removed,
            prefix_tokens=self.prefix_tokens,
            mask=None if self.mask is None else self.mask.gather(1, order),
            dropped=self.dropped,
            size=self.size,
            padding=self.padding,
        )

    def merge(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Size-weighted mean of the tokens that share an output token.

        Args:
            x: ``[B, N, C]`` with any C: tokens, positions, tokens of another branch.
            size: ``[B, N]``, how many original tokens every token stands for (not ``[B, N, 1]``). Floating or integer;
                a count, without gradient. Default: the sizes given to `merge_plan`, else ones.

        Returns:
            ``(merged, size)``: ``[B, N', C]`` in the dtype of x, and ``[B, N']`` float32. Tokens that nothing is merged
            into are copied bit for bit. Padding keeps its rows and has size 0. Sums of integer sizes are exact up to
            2²⁴. A token of size 0 counts nothing; where a whole output token has size 0, it keeps the row of the token
            it starts from.

        Half precision is averaged in float32, float64 in float64. Differentiable in x to any order; the gradient
        ``dx_n = size_n / size_out · dy_out`` is a gather. Bitwise deterministic: a token's terms are added in ascending
        order. Saved for backward: the plan and the weights, 4·B·N bytes (8 in float64).
        """
        if not self.padding:
            return merge_rows(x, self.size if size is None else size, *self.maps)
        check_rows("x", x, self.assignment, self.tokens, "[B, N, C]")
        if size is not None:
            size = check_size(size, (self.assignment.shape[0], self.tokens), "x", x)
            size = F.pad(size.to(torch.float32), (0, self.padding))
        x = F.pad(x, (0, 0, 0, self.padding))
        return merge_rows(x, self.size if size is None else size, *self.maps)

    def unmerge(self, y: Tensor) -> Tensor:
        """Give every input token a copy of its output token: ``[B, N', C]`` to ``[B, N, C]``, dtype kept.

        Masked tokens that were dropped get zeros. Differentiable in y to any order; deterministic as `merge` is.
        ``unmerge(merge(x))`` replaces every token by the mean of its group. Saved for backward: the plan.
        """
        x = unmerge_rows(y, *self.maps)
        return x[:, : self.tokens] if self.padding else x

    def track(self, origin: Tensor | None = None) -> Tensor:
        """Follow original positions through this plan: ``[B, N0]`` int64, original position to output token.

        ``origin [B, N0]`` maps original positions to the input tokens of this plan, as an earlier `track` returned it;
        None means that the input tokens are the originals. With the map of the last plan, ``y.gather(1, map[..., None]
        .expand(-1, -1, C))`` lays merged tokens back on the original grid, where a grid-shaped transform is valid.
        Values outside ``[0, N)`` are an error of torch's gather.
        """
        if origin is None:
            return self.assignment[:, : self.tokens] if self.padding else self.assignment
        check_tensor("origin", origin, layout="[B, N0]", dtypes=(torch.int64,))
        check_shape("origin", origin, (self.assignment.shape[0], origin.shape[1]), "[B, N0]")
        check_same_device("origin", origin, "the plan", self.assignment)
        return self.assignment.gather(1, origin)

    def then(self, plan: MergePlan) -> MergePlan:
        """This plan and one for its output tokens as one plan, from the input tokens of the first.

        Its `merge` with the sizes of the original tokens is the mean over all tokens that ended together, and its
        `unmerge` goes back in one step. ``plan.size`` is not read: the sizes are those of this plan.
        """
        if not isinstance(plan, MergePlan):
            raise TypeError(f"plan: expected a MergePlan, got {type(plan).__name__}")
        batch = self.assignment.shape[0]
        own = plan.track()
        check_shape("plan.assignment", own, (batch, self.merged_tokens), "[B, N'] of this plan")
        check_same_device("plan", plan.assignment, "this plan", self.assignment)
        first, size = self._matching(), self.size
        if plan.padding:
            first = extended(first, plan.padding)
            size = None if size is None else F.pad(size, (0, plan.padding))
        assignment, kept, removed, mask, dropped = plain.composed(first, plan._matching())
        padding = self.padding + plan.padding
        return self._made(assignment, kept, removed, self.prefix_tokens, mask, dropped, size, padding)

    def _matching(self) -> plain.Matching:
        return plain.Matching(*self.maps)


_FIELDS = tuple(field.name for field in fields(MergePlan))


def merge_plan(
    metric: Tensor,
    r: int,
    *,
    size: Tensor | None = None,
    guide: Tensor | None = None,
    guide_weight: float = 1.0,
    prefix_tokens: int = 1,
    mask: Tensor | None = None,
    max_merges: int | None = None,
    threshold: float | None = None,
) -> MergePlan:
    """Choose r pairs of similar tokens to merge, by even/odd bipartite matching.

    Behind the prefix, tokens at even positions of the sequence are sources and tokens at odd positions are targets.
    Every source proposes to merge into its most similar target; the r proposals of the highest score are carried out,
    any number of them into one target unless ``max_merges`` limits it:

        ``score(i → j) = cos(metric_i, metric_j) − guide_weight · guide_i``

    Ties go to the lowest position, among targets and among sources. Without a guide these are the pairs of ToMe (Bolya
    et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3), in ToMe's output order; ToMe leaves ties open.

    Args:
        metric: ``[B, N, D]``, floating point, N and D ≥ 1; commonly the attention keys averaged over heads.
        r: how many tokens to remove per sample, ≥ 0; clamped to ``(N − prefix_tokens) // 2``, the number of pairs.
        size: ``[B, N]`` sizes of the tokens, the default of `MergePlan.merge`. They do not influence the matching.
        guide: ``[B, N]``, floating point: the higher it is, the later a token merges away, for example a rank of
            importance in [0, 1] or `token_energy`. Values at targets and at prefix tokens are not read. NaN and +inf
            merge last, −inf first.
        guide_weight: factor of the guide; 0 switches it off.
        prefix_tokens: leading class and register tokens, 0 to N, that are neither sources nor targets.
        mask: ``[B, N]``, True for real tokens: booleans, or integers, of which 0 masks a token. A masked token is
            neither source nor target and moves to the end of the output. A sample with fewer than r possible merges
            carries out those it has and drops padding for the rest, so every sample shrinks by r; `MergePlan.mask` says
            which output tokens are real, and pass it to the next `merge_plan`. A masked prefix token stays in place.
        max_merges: how many sources may merge into one target at most, ≥ 1; None for any number. Pairs are then carried
            out in the order of their scores, each if its source is still free and its target has room, until there are
            r; ties go to the lowest source, then to the lowest target. All targets tie for a source whose guide is so
            large that it swallows the cosines. It keeps a flat image, whose tokens are all alike, from collapsing into
            one token. A limit below r runs in plain PyTorch, with a matrix of scores.
        threshold: cosine similarity in [−1, 1] below which two tokens do not merge; None for no limit. Such a pair is
            never carried out, whatever its score, and the r best of the others are; a cosine that equals the threshold
            merges. It is the cosine that is compared, in float32, not the score: a guide decides which pairs come
            first, not whether they are alike. Samples then merge different numbers of tokens, at most r. The sequence
            gets shorter by what every sample can spare, tokens that merge and masked ones: ``plan.r``. What a sample
            can spare beyond becomes padding at its end (masked tokens, or rows of zeros), with `MergePlan.mask` False
            and size 0 there as for any mask, to be passed on like any. Reading the numbers waits for the device once.
            What is traced (``torch.compile``, ``torch.export``, ``torch.jit.trace``, ``vmap``) cannot know them: the
            sequence keeps its length, and the real tokens are the same. Runs in plain PyTorch, with a matrix of
            cosines.

    Returns:
        The plan. No gradient flows to metric or guide: a choice has none.

    Cosines are summed in float64, whatever the dtype of the metric and autocast, then compared in float32, so that
    tokens which differ by less than its rounding tie. A vector of zeros, or one with an infinite or NaN element,
    has cosine 0 with all others. Memory: the plan keeps about 16·B·N bytes. The kernels have no matrix of scores; the
    reference has a temporary ``[B, N/2, N/2]``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
    """
    if size is not None:
        check_tokens("metric", metric)
        size = check_size(size, metric.shape[:2], "metric", metric).to(torch.float32)
    if max_merges is not None:
        r, max_merges = check_integer("r", r, minimum=0), check_integer("max_merges", max_merges, minimum=1)
        max_merges = None if max_merges >= r else max_merges
    padding = 0
    if threshold is None:
        matching = match(metric, r, guide, guide_weight, prefix_tokens, mask, max_merges)
    else:
        threshold = check_number("threshold", threshold, minimum=-1.0, maximum=1.0)
        metric, r, guide, guide_weight, prefix_tokens, mask = check_matching(
            metric, r, guide, guide_weight, prefix_tokens, mask
        )
        matching, padding = match_above(threshold, metric, r, guide, guide_weight, prefix_tokens, mask, max_merges)
        size = F.pad(size, (0, padding)) if size is not None and padding else size
    assignment, kept, removed, merged_mask, dropped = matching
    prefix_tokens = check_integer("prefix_tokens", prefix_tokens, minimum=0)
    return MergePlan._made(assignment, kept, removed, prefix_tokens, merged_mask, dropped, size, padding)


def merge_tokens(
    x: Tensor,
    metric: Tensor,
    r: int,
    *,
    size: Tensor | None = None,
    guide: Tensor | None = None,
    guide_weight: float = 1.0,
    prefix_tokens: int = 1,
    mask: Tensor | None = None,
    max_merges: int | None = None,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor, MergePlan]:
    """Plan and merge in one call: ``(merged [B, N', C], size [B, N'] float32, plan)``.

    ``x`` is ``[B, N, C]``; everything else is as in `merge_plan`, the merging as in `MergePlan.merge`.
    """
    check_tokens("x", x)
    check_tokens("metric", metric)
    check_shape("metric", metric, (x.shape[0], x.shape[1], metric.shape[2]), "[B, N, D] with B, N of x")
    check_same_device("metric", metric, "x", x)
    plan = merge_plan(
        metric,
        r,
        size=size,
        guide=guide,
        guide_weight=guide_weight,
        prefix_tokens=prefix_tokens,
        mask=mask,
        max_merges=max_merges,
        threshold=threshold,
    )
    merged, merged_size = plan.merge(x)
    return merged, merged_size, plan


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
