"""ToMe's names on this package's merging, for code that was written for ToMe.

    from mlip_kernels.patch import tome

    tome.patch.timm(model)
    model.r = 16

The functions take and return what their namesakes do (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023,
section 3 and appendix), in the same order of tokens; the code is this package's own. Where ToMe leaves a choice to the
sorting of equal scores, the lowest position comes first here.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlip_kernels._arguments import check_choice, check_integer, check_tokens
from mlip_kernels._tracing import stable_argsort
from mlip_kernels.merging import MergePlan, merge_plan, merge_schedule
from mlip_kernels.patch.timm import Rate, apply

MODES = ("mean", "sum", "prod", "amax", "amin")


class Merge:
    """``merge(x, mode="mean")``: the tokens of ``x [B, N, C]`` that share an output token, reduced: ``[B, N', C]``.

    Means are computed by `MergePlan.merge`, other modes by torch's ``scatter_reduce``. Tokens behind those that the
    plan knows are left out.
    """

    def __init__(self, plan: MergePlan) -> None:
        self.plan = plan

    def __call__(self, x: Tensor, mode: str = "mean") -> Tensor:
        check_choice("mode", mode, MODES)
        plan, x = self.plan, x[:, : self.plan.tokens]
        if mode == "mean":
            return plan.merge(x, torch.ones_like(plan.assignment))[0]
        kept = _rows(x, plan.kept)
        into = plan.assignment.gather(1, plan.removed)[..., None].expand(-1, -1, x.shape[2])
        return kept.scatter_reduce(1, into, _rows(x, plan.removed), reduce=mode)


class Unmerge:
    """``unmerge(y)``: every input token gets a copy of its output token, those that were left out get zeros."""

    def __init__(self, plan: MergePlan, tokens: int) -> None:
        self.plan, self.tokens = plan, tokens

    def __call__(self, y: Tensor) -> Tensor:
        return F.pad(self.plan.unmerge(y), (0, 0, 0, self.tokens - self.plan.tokens))


def do_nothing(x: Tensor, mode: str | None = None) -> Tensor:
    """What is returned as merge and unmerge where there is nothing to merge."""
    return x


Matching = tuple[Callable[..., Tensor], Callable[..., Tensor]]


def bipartite_soft_matching(metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False) -> Matching:
    """Merge the r most similar pairs of an even and an odd token.

    Args:
        metric: ``[B, N, C]``.
        r: pairs to merge, at most half of the tokens that may merge.
        class_token: the first token never merges. Unmerged even tokens are in ascending order then, otherwise by
            falling similarity; odd tokens come behind them.
        distill_token: the second token never merges either; with a class token only, and behind it in the output.

    Returns:
        ``(merge, unmerge)``, see `Merge` and `Unmerge`.
    """
    check_tokens("metric", metric)
    if distill_token and not class_token:
        raise ValueError("distill_token: expected class_token=True with it, since the second token is behind the first")
    protected = int(class_token) + int(distill_token)
    r = min(check_integer("r", max(r, 0), minimum=0), (metric.shape[1] - protected) // 2)
    if r <= 0:
        return do_nothing, do_nothing
    if class_token:
        plan = merge_plan(metric, r, prefix_tokens=protected)
    else:
        rows = torch.arange(metric.shape[1], device=metric.device).expand(metric.shape[:2])
        sources, targets = rows[:, ::2], rows[:, 1::2]
        similarity, best = _best(metric, sources, targets)
        order = stable_argsort(similarity, descending=True)
        plan = _plan(sources.gather(1, order), targets, best.gather(1, order), r)
    return Merge(plan), Unmerge(plan, metric.shape[1])


def kth_bipartite_soft_matching(metric: Tensor, k: int) -> Matching:
    """Merge every token into the most similar one of every k-th: N tokens become ``N // k``.

    The last ``N % k`` tokens are left out. The output has the k-th tokens, ascending.
    """
    check_tokens("metric", metric)
    if check_integer("k", k, minimum=0) <= 1:
        return do_nothing, do_nothing
    if k > metric.shape[1]:
        raise ValueError(f"k: expected at most the {metric.shape[1]} tokens of metric, got {k}: no token would be left")
    tokens = metric.shape[1] // k * k
    rows = torch.arange(tokens, device=metric.device).expand(metric.shape[0], tokens).unflatten(1, (-1, k))
    sources, targets = rows[:, :, :-1].flatten(1), rows[:, :, -1]
    plan = _plan(sources, targets, _best(metric, sources, targets)[1], sources.shape[1])
    return Merge(plan), Unmerge(plan, metric.shape[1])


def random_bipartite_soft_matching(metric: Tensor, r: int) -> Matching:
    """Merge r tokens, drawn at random, each into the most similar one of the others, which come in random order."""
    check_tokens("metric", metric)
    if r <= 0:
        return do_nothing, do_nothing
    check_integer("r", r, minimum=1, maximum=metric.shape[1] - 1)
    with torch.no_grad():
        order = torch.rand(metric.shape[:2], device=metric.device).argsort(dim=1)
    sources, targets = order[:, :r], order[:, r:]
    plan = _plan(sources, targets, _best(metric, sources, targets)[1], r)
    return Merge(plan), Unmerge(plan, metric.shape[1])


def merge_wavg(merge: Callable[..., Tensor], x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean of the merged tokens, weighted by their sizes.

    Args:
        merge: of a matching.
        x: ``[B, N, C]``.
        size: ``[B, N, 1]``, ones if None.

    Returns:
        Tokens ``[B, N', C]`` and sizes ``[B, N', 1]``; the sizes are float32, so that they count on in half precision.
    """
    if size is None:
        size = torch.ones_like(x[..., :1], dtype=torch.float32)
    if isinstance(merge, Merge):
        tokens = merge.plan.tokens
        merged, merged_size = merge.plan.merge(x[:, :tokens], size[:, :tokens, 0])
        return merged, merged_size[..., None]
    total = merge(size, mode="sum")
    return (merge(x * size, mode="sum") / total).to(x.dtype), total


def merge_source(merge: Callable[..., Tensor], x: Tensor, source: Tensor | None = None) -> Tensor:
    """Which tokens of the beginning are in which merged token: ``[B, N', N]`` of zeros and ones.

    `MergePlan.track` keeps the same in O(N).
    """
    if source is None:
        batch, tokens, _ = x.shape
        source = torch.eye(tokens, device=x.device).expand(batch, tokens, tokens)
    return merge(source, mode="amax")


def parse_r(num_layers: int, r: Rate) -> list[int]:
    """r of every layer: `mlip_kernels.merge_schedule` with its arguments in ToMe's order."""
    return merge_schedule(r, num_layers)


def patch_timm(model: nn.Module, trace_source: bool = False, prop_attn: bool = True) -> None:
    """`mlip_kernels.patch.timm.apply` by ToMe's arguments; set ``model.r`` afterwards."""
    if trace_source:
        raise ValueError(
            "trace_source: expected False; model.forward_merged(x) returns the plan, whose assignment says where every "
            "token went"
        )
    apply(model, proportional_attention=prop_attn)


def _best(metric: Tensor, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine similarity of every source to its most similar target, and the number of that: ``[B, S]`` each.

    Summed in float64 and compared in float32, as in `merge_plan`.
    """
    with torch.no_grad(), torch.autocast(metric.device.type, enabled=False):
        unit = F.normalize(metric.double(), dim=-1)
        cosine = _rows(unit, sources) @ _rows(unit, targets).transpose(1, 2)
        similarity, best = cosine.float().nan_to_num(nan=0.0).max(dim=-1)
    return similarity, best


def _plan(sources: Tensor, targets: Tensor, best: Tensor, r: int) -> MergePlan:
    """Merge the first r sources; the output has the other sources, then the targets, each in the order given."""
    kept = torch.cat((sources[:, r:], targets), dim=1)
    unmerged = sources.shape[1] - r
    numbers = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    assignment = kept.new_empty(kept.shape[0], kept.shape[1] + r).scatter_(1, kept, numbers)
    assignment.scatter_(1, sources[:, :r], best[:, :r] + unmerged)
    return MergePlan._made(assignment, kept, sources[:, :r].sort(dim=1).values, prefix_tokens=0)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))


merge = SimpleNamespace(
    bipartite_soft_matching=bipartite_soft_matching,
    kth_bipartite_soft_matching=kth_bipartite_soft_matching,
    random_bipartite_soft_matching=random_bipartite_soft_matching,
    merge_wavg=merge_wavg,
    merge_source=merge_source,
)
"""ToMe's module ``tome.merge``."""

utils = SimpleNamespace(parse_r=parse_r)
"""ToMe's module ``tome.utils``."""

patch = SimpleNamespace(timm=patch_timm)
"""ToMe's module ``tome.patch``."""
