"""Classes of modules exchanged in place, so that parameters, buffers, hooks and names stay as they are.

A table says which class of timm becomes which merging class. Subclasses and the classes that FSDP2 puts in front of a
module's own are dealt with here: each becomes one that does the same with the merging class behind it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

Table = Mapping[type[nn.Module], type[nn.Module]]

WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
"""Where wrappers keep their module: torch.compile, FSDP1, activation checkpointing, DistributedDataParallel."""

_made: dict[tuple[type, tuple[type, ...]], type] = {}


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside wrappers that pass on to it what they are called with."""
    while len(module._modules) == 1:
        (name, inner), *_ = module._modules.items()
        if name not in WRAPPED or inner is None:
            break
        module = inner
    return module


def known_base(kind: type[nn.Module], table: Table) -> type[nn.Module] | None:
    """The class of ``table`` that ``kind`` is or descends from; ``None`` if there is none."""
    return next((base for base in kind.__mro__ if base in table), None)


def overridden(kind: type[nn.Module], base: type[nn.Module], names: Sequence[str]) -> list[str]:
    """Which methods of ``base`` a class descending from it replaces; one that is merely wrapped is not replaced."""
    return [name for name in names if not _same(getattr(kind, name), getattr(base, name))]


def _same(one: Any, other: Any) -> bool:
    """Whether two functions are one below wrappers, such as transformers' layers put around each subclass's forward."""
    return inspect.unwrap(one) is inspect.unwrap(other)


def merges(kind: type[nn.Module], table: Table) -> bool:
    """Whether a class is or descends from a merging one."""
    return issubclass(kind, tuple(table.values()))


def exchange(module: nn.Module, table: Table) -> None:
    """Give a module, whose class descends from one of ``table``, the merging class."""
    kind = type(module)
    if not merges(kind, table):
        module.__class__ = _merging(kind, table)


def restore(module: nn.Module, table: Table) -> None:
    """Give a module the class it had before `exchange`."""
    module.__class__ = _original(type(module), {merging: original for original, merging in table.items()})


def _merging(kind: type[nn.Module], table: Table) -> type[nn.Module]:
    if kind in table:
        return table[kind]
    if _is_sharded(kind):
        return _rebased(kind, tuple(_merging(b, table) if issubclass(b, nn.Module) else b for b in kind.__bases__))
    base = known_base(kind, table)
    assert base is not None  # checked before anything is exchanged
    return _joined(kind, table[base])


def _joined(kind: type[nn.Module], merging: type[nn.Module]) -> type[nn.Module]:
    """A subclass first, the merging class of its base behind it: there arrives what the subclass passes to super()."""
    bases = (kind, merging)
    if (kind, bases) not in _made:
        body = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce_ex__": _reduce, "_unpatched": kind}
        _made[kind, bases] = type(f"Merging{kind.__name__}", bases, body)
    return _made[kind, bases]


def _original(kind: type[nn.Module], originals: Table) -> type[nn.Module]:
    if kind in originals:
        return originals[kind]
    if "_unpatched" in vars(kind):
        return kind._unpatched  # type: ignore[attr-defined]
    if _is_sharded(kind):
        return _rebased(kind, tuple(_original(b, originals) if issubclass(b, nn.Module) else b for b in kind.__bases__))
    return kind


def _is_sharded(kind: type) -> bool:
    """Whether FSDP2 made this class: its own in front of the module's."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return fsdp is not None and any(issubclass(b, fsdp) and not issubclass(b, nn.Module) for b in kind.__bases__)


def _rebased(kind: type[nn.Module], bases: tuple[type, ...]) -> type[nn.Module]:
    """``kind`` with other bases and nothing else changed but the part of its name that is that of the last base."""
    if bases == kind.__bases__:
        return kind
    if (kind, bases) not in _made:
        name = kind.__name__.replace(kind.__bases__[-1].__name__, bases[-1].__name__)
        before, left_out = kind.__bases__[-1], ("__dict__", "__weakref__")
        body = {key: value for key, value in vars(kind).items() if key not in left_out}
        for key in [key for key, value in body.items() if callable(value) and _same(value, getattr(before, key, None))]:
            del body[key]  # around a method of the base: the new base brings its own
        _made[kind, bases] = type(name, bases, body)
    return _made[kind, bases]


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Copy and pickle by classes that can be imported; the one of `_joined` was made while running."""
    kind: type[Any] = next(kind for kind in type(module).__mro__ if "_unpatched" in vars(kind))
    _, _, *rest = super(kind, module).__reduce_ex__(protocol)
    return (_remade, kind.__bases__, *rest)


def _remade(kind: type[nn.Module], merging: type[nn.Module]) -> nn.Module:
    joined = _joined(kind, merging)
    return joined.__new__(joined)
