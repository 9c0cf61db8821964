"""The settings of a model whose blocks merge: checked once, where they are made."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from mlip_kernels._arguments import check_integer, check_number
from mlip_kernels.merging import keep_rate_schedule, merge_schedule, token_counts
from mlip_kernels.nn.guidance import GUIDES, READS_ENERGY, Guide

Rate = int | tuple[int, float] | list[int]

ENERGY_CUTOFF = 0.5
FEWEST_PATCHES = 2
"""As many patch tokens or fewer, where there were more, are hardly what anyone means to be left with."""


@dataclass(frozen=True)
class Merging:
    """The settings of a patched model."""

    r: Rate = 0
    """Tokens to merge in each block, in one of the forms of `mlip_kernels.merge_schedule`."""
    keep_rate: float | None = None
    """Instead of r: the share of patch tokens to keep, as in `mlip_kernels.keep_rate_schedule`."""
    layers: tuple[int, ...] | None = None
    """The blocks that merge under ``keep_rate``."""
    overall: bool = False
    """Whether ``keep_rate`` is the share kept at the end, not in every merging block."""
    guide: Guide | None = None
    """How informative tokens are: informative ones merge last."""
    guide_weight: float = 1.0
    """Factor of the guide."""
    energy_cutoff: float | None = None
    """Normalised frequency from which on energy is high-frequency energy; ``None`` where no guide reads it."""
    proportional_attention: bool = True
    """Whether a merged token attracts as much attention as the patches it stands for."""
    max_merges: int | None = None
    """How many tokens may merge into one at most, in one block; ``None``: any number."""
    threshold: float | None = None
    """Cosine similarity below which tokens do not merge; ``None``: they merge however little they resemble."""
    training_only: bool = False
    """Whether nothing merges in evaluation mode."""
    depth: int = 0
    """Blocks of the model when r or ``keep_rate`` was set; those that are left of them merge what they did then."""

    def schedule(self, depth: int, patches: int) -> list[int]:
        """r of every block of a model with ``depth`` blocks, whether it is in training mode or not."""
        planned = max(depth, self.depth)
        if self.keep_rate is None:
            whole = merge_schedule(self.r, planned)
        else:
            whole = keep_rate_schedule(self.keep_rate, patches, planned, layers=self.layers, overall=self.overall)
        return whole[:depth]


class Settings(TypedDict, total=False):
    """Settings beside r that every patch takes by name; `mlip_kernels.patch.timm.apply` says what they mean."""

    keep_rate: float | None
    layers: Sequence[int] | None
    overall: bool
    guide: Guide | str | None
    guide_weight: float
    energy_cutoff: float | None
    proportional_attention: bool
    max_merges: int | None
    threshold: float | None
    training_only: bool


def checked(
    depth: int,
    patches: int,
    *,
    r: Rate = 0,
    keep_rate: float | None = None,
    layers: Sequence[int] | None = None,
    guide: Guide | str | None = None,
    energy_cutoff: float | None = None,
    **others: Any,
) -> Merging:
    """The settings of `mlip_kernels.patch.timm.apply`, as given there, for a model of ``depth`` blocks.

    Raises:
        TypeError, ValueError: a setting has the wrong type or is out of range.
    """
    for name in others:
        if name not in Settings.__annotations__:
            raise TypeError(f"{name}: expected one of the settings r, {', '.join(Settings.__annotations__)}")
    if keep_rate is not None and r != 0:
        raise ValueError(f"keep_rate: expected either r or keep_rate, got r={r} and keep_rate={keep_rate}")
    if isinstance(guide, str):
        if guide not in GUIDES:
            raise ValueError(f"guide: expected one of {sorted(GUIDES)}, a function or None, got {guide!r}")
        guide = GUIDES[guide]
    elif guide is not None and not callable(guide):
        raise TypeError(f"guide: expected one of {sorted(GUIDES)}, a function or None, got {type(guide).__name__}")
    if energy_cutoff is not None:
        check_number("energy_cutoff", energy_cutoff, minimum=0.0, maximum=1.0)
    elif guide in READS_ENERGY:
        energy_cutoff = ENERGY_CUTOFF
    settings = Merging(
        r=r,
        keep_rate=keep_rate,
        layers=None if layers is None else tuple(layers),
        guide=guide,
        energy_cutoff=energy_cutoff,
        depth=depth,
        **others,
    )
    check_number("guide_weight", settings.guide_weight)
    if settings.max_merges is not None:
        check_integer("max_merges", settings.max_merges, minimum=1)
    if settings.threshold is not None:
        check_number("threshold", settings.threshold, minimum=-1.0, maximum=1.0)
    settings.schedule(depth, patches)
    return settings


def changed(settings: Merging, depth: int, patches: int, changes: Mapping[str, Any]) -> Merging:
    """Settings with some of them changed, checked as `checked` does, for a model that has ``depth`` blocks now."""
    names = {field.name for field in fields(Merging)} - {"depth"}
    for name in changes:
        if name not in names:
            raise TypeError(f"{name}: expected one of the settings {', '.join(sorted(names))}")
    kept = {name: getattr(settings, name) for name in names}
    if "r" in changes:
        kept |= {"keep_rate": None, "layers": None, "overall": False}
    elif "keep_rate" in changes:
        kept["r"] = 0
    if "guide" in changes:
        kept["energy_cutoff"] = None
    if {"r", "keep_rate", "layers", "overall"} & set(changes):
        new = checked(depth, patches, **{**kept, **changes})
        warn_of_surprises(new, depth, patches)
        return new
    return checked(max(depth, settings.depth), patches, **{**kept, **changes})


def warn_of_surprises(settings: Merging, depth: int, patches: int) -> None:
    """Warn where a schedule is hardly what was meant."""
    r, schedule = settings.r, settings.schedule(depth, patches)
    if isinstance(r, list) and 0 < len(r) < depth:
        warnings.warn(
            f"r: got {len(r)} entries for {depth} blocks, so the last {depth - len(r)} merge nothing; give {depth} "
            "entries, 0 for blocks that are not to merge",
            stacklevel=3,
        )
    left = token_counts(schedule, patches)[-1]
    if left <= FEWEST_PATCHES < patches:
        warnings.warn(
            f"r: of {patches} patch tokens, {left} are left behind the last of {depth} blocks, since a block can merge "
            "half of what comes in and no more; merge fewer, or give keep_rate",
            stacklevel=3,
        )
