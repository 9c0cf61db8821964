"""Operators in torch's dispatcher, and the compiled parts that implement them where they could be built.

One operator has one name, and torch's dispatcher is the switch:

    CPU      C++ (``csrc/cpu``), registered by ``_cpu.so``
    CUDA     `_on_cuda` below: Triton or CUDA C++, chosen by ``MLIP_KERNELS_CUDA_BACKEND``
    others   the plain-PyTorch reference, which also stands in for every part that is absent

Schemas, references, fakes and gradients are registered from Python, so the package imports, traces and trains even
where nothing was compiled. The CUDA C++ kernels live under the same names in a namespace of their own,
``mlip_kernels_cuda``, so that they do not occupy the CUDA key that Triton shares with them.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("mlip_kernels", "DEF")
CUDA_LIBRARY = torch.library.Library("mlip_kernels_cuda", "DEF")

DISABLED = os.environ.get("MLIP_KERNELS_DISABLE_EXT") == "1"
"""Whether the user asked for the reference everywhere: neither compiled parts nor Triton."""

LOADED: dict[str, str] = {}
"""Compiled part (``cpu``, ``cuda``) -> ``"ok"`` or the reason why it is absent."""

REMEDY = {
    "cpu": "install a C++ compiler (on Debian and Ubuntu: apt install g++)",
    "cuda": "install the CUDA toolkit with nvcc (or name it in CUDA_HOME), or Triton",
}

_triton_kernels: dict[str, str] = {}
_warned: set[str] = set()
_asked_for_reference: ContextVar[bool] = ContextVar("mlip_kernels_use_reference", default=False)


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.depth = 0


_references_of_thread = _OfThread()
"""How many `use_reference` are active in a thread. ``torch.compile`` follows this: it cannot set a ContextVar, and
before torch 2.14 not read one either. Compiled functions therefore tell threads apart, but not tasks of one thread."""


@contextmanager
def use_reference() -> Iterator[None]:
    """Run every operator called inside on the plain-PyTorch reference, whatever is compiled.

    The reference is ordinary autograd: it also serves ``torch.func`` and second derivatives, which the kernels refuse.
    Backward passes run on what their forward pass ran on, wherever they are called; what ``torch.utils.checkpoint``
    computes again is a forward pass, so call the backward of a checkpoint where you called its forward.

    It holds for the thread and the ``asyncio`` task that it is entered in, and for what is traced inside of it.
    """
    traced = torch.compiler.is_dynamo_compiling()
    before = False if traced else _asked_for_reference.get()
    if not traced:
        _asked_for_reference.set(True)
    _references_of_thread.depth += 1
    try:
        yield
    finally:
        _references_of_thread.depth -= 1
        if not traced:
            _asked_for_reference.set(before)


def reference_requested() -> bool:
    """Whether `use_reference` is active in this thread and task."""
    if torch.compiler.is_dynamo_compiling():
        return _references_of_thread.depth > 0
    return _asked_for_reference.get()


def plain_needed() -> bool:
    """Whether operators have to give way to plain PyTorch: it was asked for, or it alone can be transformed.

    Public functions ask this. An operator that is called all the same refuses what it cannot do (`differentiate`).
    """
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transformed or reference_requested()


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: str | None = None,
    kernels: bool = True,
) -> Callable[..., Any]:
    """Define the operator ``mlip_kernels::<schema>`` for every device, and return what calls it.

    Args:
        schema: name, arguments and results as in ``native_functions.yaml``; the first tensor decides the device.
        reference: the operator in plain PyTorch, returning contiguous tensors.
        fake: the shapes and dtypes of the results, for tracing.
        triton: ``"module:function"`` of the Triton launcher, imported at the first CUDA call.
        kernels: whether there are any; without, the reference is what runs everywhere, by design and without a warning.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    torch.library.register_fake(f"mlip_kernels::{name}", fake, lib=LIBRARY)
    if not kernels:
        LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        return getattr(torch.ops.mlip_kernels, name).default
    CUDA_LIBRARY.define(schema)
    if triton is not None:
        _triton_kernels[name] = triton

    def fallback(*arguments: Any) -> Any:
        _warn_if_slow(_device(arguments).type)
        return reference(*arguments)

    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    if not DISABLED:
        LIBRARY.impl(name, functools.partial(_on_cuda, name, fallback), "CUDA")
    return getattr(torch.ops.mlip_kernels, name).default


def define_out(name: str, *outputs: str) -> Callable[..., None]:
    """Define ``mlip_kernels::<name>_out``: the operator ``name`` with its results in tensors given as last arguments.

    Everywhere it computes and copies. A compiled part spares that where it registers a kernel of its own under this
    name; the kernel copes with outputs that are not contiguous or share memory with an argument, as a copy does.
    It has no gradient: public functions refuse what autograd would record (`mlip_kernels.ops.arguments.check_out`).

    Args:
        name: an operator that `define` has defined.
        outputs: what to call the tensor for each result.
    """
    operator = getattr(torch.ops.mlip_kernels, name).default
    name = f"{name}_out"
    arguments = str(operator._schema).partition("(")[2].rpartition(") -> ")[0]
    written = ", ".join(f"Tensor({chr(ord('a') + i)}!) {output}" for i, output in enumerate(outputs))
    LIBRARY.define(f"{name}({arguments}, {written}) -> ()")
    given = -len(outputs)

    def compute_and_copy(*arguments: Any) -> None:
        results = operator(*arguments[:given])
        for output, result in zip(arguments[given:], results if given < -1 else (results,), strict=True):
            output.copy_(result)

    def note_the_change(keys: Any, *arguments: Any) -> None:
        """What was saved of an output for a backward pass is no longer there, and autograd is to see that."""
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, arguments)
        torch.autograd.graph.increment_version(arguments[given:])
        call.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)

    def fake(*arguments: Any) -> None:
        """Nothing is returned."""

    LIBRARY.impl(name, compute_and_copy, "CompositeExplicitAutograd")
    LIBRARY.impl(name, note_the_change, "ADInplaceOrView", with_keyset=True)
    torch.library.register_fake(f"mlip_kernels::{name}", fake, lib=LIBRARY)
    call = getattr(torch.ops.mlip_kernels, name).default
    return call


def differentiate(
    name: str,
    *,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    through: tuple[str, ...],
) -> None:
    """Give the operator ``name`` its gradient, computed by the operators ``through``.

    A registered formula serves eager mode, ``torch.compile(fullgraph=True)`` and ``torch.export`` alike, and costs
    less per call than a ``torch.autograd.Function`` with a ``setup_context`` of its own. What is not implemented
    raises: without the second registration a gradient of the gradient would silently be zero, and a tangent of
    forward-mode differentiation would be lost without the look at the arguments.
    """
    _record(name, backward, setup_context)

    def refuse(context: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"mlip_kernels::{name} has no second derivative; compute it inside `with mlip_kernels.use_reference():`"
        )

    for operator in through:
        _record(operator, refuse)


def _record(name: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None) -> None:
    """What `torch.library.register_autograd` does, and a refusal of tangents.

    A call that nothing is recorded of goes on from here: through ``record`` it would pass two more functions.
    """
    operator = getattr(torch.ops.mlip_kernels, name).default
    record = make_autograd_impl(operator, Info(backward, setup_context))

    def autograd(keys: Any, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, arguments)
        if torch._C.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return record(keys, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)


def _refuse_tangents(name: str, arguments: tuple[Any, ...]) -> None:
    for argument in arguments:
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise NotImplementedError(
                f"mlip_kernels::{name} has no forward-mode derivative; the public functions of mlip_kernels have one,"
                " computed by plain PyTorch"
            )


def _on_cuda(name: str, fallback: Callable[..., Any], *arguments: Any) -> Any:
    """The CUDA key of every operator: the chosen backend, on the device of the tensors."""
    kernel = cuda_kernel(name)
    if kernel is None or not kernels_take(arguments):
        return fallback(*arguments)
    with torch.cuda.device(_device(arguments)):
        return kernel(*arguments)


def kernels_take(arguments: tuple[Any, ...]) -> bool:
    """Whether the GPU kernels compute on ``arguments``: float64 is left to the reference."""
    return _first_tensor(arguments).dtype != torch.float64


@functools.cache
def cuda_kernel(name: str) -> Callable[..., Any] | None:
    """What computes operator ``name`` on CUDA tensors; ``None`` where ``auto`` finds neither Triton nor CUDA C++.

    ``auto`` prefers Triton, whose launches take the road that every user of ``torch.compile`` takes.

    Raises:
        ValueError: ``MLIP_KERNELS_CUDA_BACKEND`` is not ``auto``, ``triton`` or ``cuda``.
        RuntimeError: it asks for a backend that is not there; the message says why.
    """
    choice = os.environ.get("MLIP_KERNELS_CUDA_BACKEND") or "auto"
    find = {"triton": _find_triton, "cuda": _find_cuda}
    if choice not in ("auto", *find):
        raise ValueError(f"MLIP_KERNELS_CUDA_BACKEND: expected 'auto', 'triton' or 'cuda', got {choice!r}")
    for backend in find if choice == "auto" else (choice,):
        kernel, reason = find[backend](name)
        if kernel is not None:
            return kernel
        if choice != "auto":
            raise RuntimeError(f"MLIP_KERNELS_CUDA_BACKEND={choice}, but {name} cannot run on it: {reason}")
    return None


def _find_triton(name: str) -> tuple[Callable[..., Any] | None, str]:
    if name not in _triton_kernels:
        return None, "it has no Triton kernel"
    module, _, function = _triton_kernels[name].partition(":")
    try:
        return getattr(importlib.import_module(module), function), ""
    except ImportError as failure:
        return None, f"Triton cannot be imported ({failure}); pip install triton"


def _find_cuda(name: str) -> tuple[Callable[..., Any] | None, str]:
    if LOADED["cuda"] != "ok":
        return None, f"the CUDA part is absent ({LOADED['cuda']})"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"mlip_kernels_cuda::{name}", "CUDA"):
        return None, "it has no CUDA C++ kernel"
    return getattr(torch.ops.mlip_kernels_cuda, name).default, ""


def _warn_if_slow(part: str) -> None:
    """Say once per device type that the reference stands in for kernels which are absent, and how to get them."""
    if part not in LOADED or LOADED[part] == "ok" or DISABLED or part in _warned:
        return
    _warned.add(part)
    warnings.warn(
        f"mlip_kernels: no compiled {part.upper()} kernels ({LOADED[part]}); the slower PyTorch reference runs instead."
        f" To build them, {REMEDY[part]} and install again, in the source folder:"
        " pip install --force-reinstall --no-deps ."
        " Details: python -m mlip_kernels.env. MLIP_KERNELS_DISABLE_EXT=1 asks for the reference and silences this.",
        stacklevel=4,
    )


def _first_tensor(arguments: tuple[Any, ...]) -> Tensor:
    return next(argument for argument in arguments if isinstance(argument, Tensor))


def _device(arguments: tuple[Any, ...]) -> torch.device:
    return _first_tensor(arguments).device


def build_record() -> dict[str, Any]:
    """What the build wrote down: each part as ``"ok"`` or its reason, and the tools; empty if it never ran."""
    try:
        return json.loads(Path(__file__).with_name("_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def load() -> None:
    """Load the compiled parts that lie beside this file, and note why the others are absent."""
    for part in ("cpu", "cuda"):
        path = Path(__file__).with_name(f"_{part}.so")
        if DISABLED:
            LOADED[part] = "disabled by MLIP_KERNELS_DISABLE_EXT=1"
        elif not path.exists():
            reason = build_record().get(part, "not built")
            LOADED[part] = "the file is missing" if reason == "ok" else reason
        else:
            try:
                torch.ops.load_library(path)
                LOADED[part] = "ok"
            except (OSError, RuntimeError) as failure:
                LOADED[part] = f"cannot be loaded: {failure}"


load()
