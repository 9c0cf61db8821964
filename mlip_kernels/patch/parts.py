"""Which modules of other people's models can be exchanged for merging ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from mlip_kernels.patch.classes import Table, known_base, merges, overridden

Part = TypeVar("Part")


def only_one(found: Mapping[str, Part], model: nn.Module, wanted: str) -> Part:
    """The one part that a model holds, of those found in it by name.

    Raises:
        ValueError: there are several; the error says where.
    """
    if len(found) > 1:
        places = ", ".join(f"model.{name}" for name in found)
        raise ValueError(
            f"model: expected one {wanted}, got {type(model).__name__} with {len(found)} of them; give one of {places}"
        )
    return next(iter(found.values()))


def check_part(where: str, module: nn.Module, table: Table, replaced: Sequence[str], wanted: str, why: str) -> None:
    """Raise unless a module is one that ``table`` can exchange, with the methods of its class.

    Args:
        where: what the module is called in errors.
        replaced: the methods that the merging class replaces; a module that has its own of these would lose them.
        wanted: which classes are expected.
        why: what would go wrong with another class.

    Raises:
        TypeError: it is not.
    """
    kind = type(module)
    base = known_base(kind, table)
    if base is None:
        raise TypeError(f"{where}: expected {wanted}, got {kind.__name__}{why}")
    if merges(kind, table):
        return
    if own := overridden(kind, base, replaced):
        raise TypeError(f"{where}: expected {wanted}, got {kind.__name__}, which has its own {', '.join(own)}")
    if own := [name for name in replaced if name in vars(module)]:
        raise TypeError(
            f"{where}: expected the methods of its class, got a module with its own {', '.join(own)}; apply the patch "
            "before they are replaced"
        )
