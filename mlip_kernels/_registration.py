"""Libraries of operators that can be opened again, and gradients and fakes registered in little time.

``torch.library.register_autograd`` makes several classes for each operator, and ``register_fake`` looks up where in the
source it is called: together two thirds of what importing this package cost. The same registrations are made here, the
classes when an operator is first recorded, and the operator's name in place of a line of source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

OPENED = "_opened_libraries"


def open_library(namespace: str, kind: str = "DEF") -> torch.library.Library:
    """``torch.library.Library(namespace, kind)`` for the operators of this package.

    Whoever drops the package from ``sys.modules`` and imports it again defines its operators again: what the import
    before defined goes first. Functions of that import then call the operators of the new one.
    """
    operators = getattr(torch.ops, namespace)
    opened = vars(operators).setdefault(OPENED, [])
    if kind == "DEF":
        for library in opened:
            _close(library)
        opened.clear()
    library = torch.library.Library(namespace, kind)
    opened.append(library)
    return library


def _close(library: torch.library.Library) -> None:
    """Take back definitions. A kernel that never runs keeps the dispatcher from freeing what old functions hold."""
    kept = torch.library.Library(library.ns, "IMPL")
    vars(getattr(torch.ops, library.ns)).setdefault("_kept_libraries", []).append(kept)
    for name in sorted(library._op_defs):
        key = f"{library.ns}/{name.partition('::')[2]}/PrivateUse3"
        if key not in torch.library._impls:
            kept.impl(name.partition("::")[2], torch.library.fallthrough_kernel, "PrivateUse3")
    library._destroy()


def register_fake(library: torch.library.Library, name: str, fake: Callable[..., Any]) -> None:
    """Trace the operator ``name``, defined in ``library``, by ``fake``, which returns tensors without data."""
    qualified = f"{library.ns}::{name}"
    fakes = torch._library.simple_registry.singleton.find(qualified).fake_impl
    library._registration_handles.append(fakes.register(fake, qualified, lib=library))


def refuse_tangents(name: str, arguments: tuple[Any, ...]) -> None:
    """Raise if an argument has a tangent of forward-mode differentiation, which the operator ``name`` would lose."""
    for argument in arguments:
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise NotImplementedError(
                f"mlip_kernels::{name} has no forward-mode derivative; the public functions of mlip_kernels have one,"
                " computed by plain PyTorch"
            )
