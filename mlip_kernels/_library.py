"""Operators in torch's dispatcher, and the compiled parts that implement them where they could be built.

One operator has one name, and torch's dispatcher is the switch:

    CPU      C++ (``csrc/cpu``), registered by ``_cpu.so``
    CUDA     `_on_cuda` below: Triton or CUDA C++, chosen by ``MLIP_KERNELS_CUDA_BACKEND`` or by `_cuda_choices`
    others   the plain-PyTorch reference, which also stands in for every part that is absent

Schemas, references, fakes and gradients are registered from Python, so the package imports, traces and trains even
where nothing was compiled. The CUDA C++ kernels live under the same names in a namespace of their own,
``mlip_kernels_cuda``, so that they do not occupy the CUDA key that Triton shares with them. That namespace is filled,
and its library loaded, when an operator first runs on CUDA.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _after_autograd_keyset, _any_requires_grad, _AutoDispatchBelowAutograd
from torch.autograd import forward_ad

from mlip_kernels import _cuda_choices, _loading, _variables
from mlip_kernels._build_record import PARTS
from mlip_kernels._loading import DISABLED, LOADED
from mlip_kernels._tracing import refuse_onnx

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


def refuse_tangents(name: str, arguments: tuple[Any, ...]) -> None:
    """Raise if an argument has a tangent of forward-mode differentiation, which the operator ``name`` would lose."""
    for argument in arguments:
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise NotImplementedError(
                f"mlip_kernels::{name} has no forward-mode derivative; the public functions of mlip_kernels have one,"
                " computed by plain PyTorch"
            )


LIBRARY = open_library("mlip_kernels")
CUDA_LIBRARY = open_library("mlip_kernels_cuda")

_cuda_schemas: dict[str, str] = {}
_triton_kernels: dict[str, str] = {}
_references: dict[str, Callable[..., Any]] = {}
_warned: set[str] = set()
_HALF_PRECISION = (torch.bfloat16, torch.float16)


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None,
    triton: str | None = None,
    kernels: bool = True,
) -> Any:
    """Define the operator ``mlip_kernels::<schema>`` for every device, and return what calls it.

    Args:
        schema: name, arguments and results as in ``native_functions.yaml``; the first tensor decides the device.
        reference: the operator in plain PyTorch, returning contiguous tensors.
        fake: the shapes and dtypes of the results, for tracing; None where nothing traces the operator.
        triton: ``"module:function"`` of the Triton launcher, imported at the first CUDA call.
        kernels: whether there are any; without, the reference is what runs everywhere, by design and without a warning.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)

    if fake is not None:
        _trace(name, fake)
    if not kernels:
        LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        return getattr(torch.ops.mlip_kernels, name).default
    _cuda_schemas[name], _references[name] = schema, reference
    if triton is not None:
        _triton_kernels[name] = triton

    def fallback(*arguments: Any) -> Any:
        _warn_if_slow(_device(arguments).type)
        return reference(*arguments)

    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    if not DISABLED:
        LIBRARY.impl(name, functools.partial(_on_cuda, name, fallback), "CUDA")
    return getattr(torch.ops.mlip_kernels, name).default


def _trace(name: str, fake: Callable[..., Any]) -> None:
    def fake_of_graphs(*arguments: Any) -> Any:
        refuse_onnx(name)
        return fake(*arguments)

    LIBRARY.impl(name, fake_of_graphs, "Meta")


def define_kernel(schema: str, *, reference: Callable[..., Any], triton: str | None = None) -> Any:
    """`define` an operator that only operators call, which has neither a fake nor a gradient: it refuses both."""
    operator = define(schema, reference=reference, fake=None, triton=triton)
    name = operator._opname

    def refuse_gradients(keys: Any, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_tangents(name, arguments)
        if torch.is_grad_enabled() and _any_requires_grad(*arguments):
            raise RuntimeError(f"mlip_kernels::{name} has no gradient; call the public function that it serves")
        with _AutoDispatchBelowAutograd():
            return operator.redispatch(keys & _after_autograd_keyset, *arguments)

    LIBRARY.impl(name, refuse_gradients, "Autograd", with_keyset=True)
    return operator


def define_out(name: str, *outputs: str, write: Callable[..., None] | None = None) -> Callable[..., None]:
    """Define ``mlip_kernels::<name>_out``: the operator ``name`` with its results in tensors given as last arguments.

    Without ``write`` it computes and copies. A compiled part spares that where it registers a kernel of its own under
    this name; the kernel copes with outputs that are not contiguous or share memory with an argument, as a copy does.
    It has no gradient: public functions refuse what autograd would record (`mlip_kernels._arguments.check_out`).

    Args:
        name: an operator that `define` has defined.
        outputs: what to call the tensor for each result.
        write: ``write(*arguments, *outputs)`` computes the results in their place.
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
        """Bump version counters, so that autograd detects that tensors saved for backward were overwritten."""
        if forward_ad._current_level >= 0:
            refuse_tangents(name, arguments)
        torch.autograd.graph.increment_version(arguments[given:])
        call.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)

    def fake(*arguments: Any) -> None:
        """Nothing is returned."""

    LIBRARY.impl(name, write or compute_and_copy, "CompositeExplicitAutograd")
    LIBRARY.impl(name, note_the_change, "ADInplaceOrView", with_keyset=True)
    LIBRARY.impl(name, fake, "Meta")
    call = getattr(torch.ops.mlip_kernels, name).default
    return call


def _on_cuda(name: str, fallback: Callable[..., Any], *arguments: Any) -> Any:
    """The CUDA key of every operator: the chosen backend, on the device of the tensors."""
    device = _device(arguments)
    kernel = cuda_kernel(name, _dtype_of_tokens(arguments), _architecture(device.index))
    if kernel is None or not kernels_take(arguments):
        return fallback(*arguments)
    with torch.cuda.device(device):
        return kernel(*arguments)


def kernels_take(arguments: tuple[Any, ...]) -> bool:
    """Whether the GPU kernels compute on ``arguments``: float64 is left to the reference."""
    return _first_tensor(arguments).dtype != torch.float64


@functools.cache
def cuda_kernel(name: str, dtype: torch.dtype, arch: int) -> Callable[..., Any] | None:
    """What computes operator ``name`` on CUDA tensors; ``None`` where ``auto`` finds neither Triton nor CUDA C++.

    ``auto`` takes what the table of `_cuda_choices` says, and if that backend is absent, the other one.

    Args:
        name: of the operator.
        dtype: of the tokens.
        arch: of the GPU, such as 90 for sm_90.

    Raises:
        ValueError: ``MLIP_KERNELS_CUDA_BACKEND`` is not ``auto``, ``triton`` or ``cuda``.
        RuntimeError: it asks for a backend that is not there; the message says why.
    """
    asked = _variables.read("MLIP_KERNELS_CUDA_BACKEND") or "auto"
    find = {"cuda": _find_cuda, "triton": _find_triton}
    if asked != "auto":
        kernel, reason = find[asked](name)
        if kernel is None:
            raise RuntimeError(f"MLIP_KERNELS_CUDA_BACKEND={asked}, but {name} cannot run on it: {reason}")
        return kernel
    chosen = _cuda_choices.choice(name, str(dtype).removeprefix("torch."), arch)
    if chosen == "plain":
        return _references[name]
    for backend in sorted(find, key=lambda backend: backend != chosen):
        kernel, _ = find[backend](name)
        if kernel is not None:
            return kernel
    return None


@functools.cache
def _architecture(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


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
    operator = cuda_operator(name)
    if operator is None or not torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CUDA"):
        return None, "it has no CUDA C++ kernel"
    return operator, ""


def has_kernels(name: str) -> bool:
    """Whether there are kernels under the very name of an operator; others call operators that have some."""
    return name in _cuda_schemas


@functools.cache
def cuda_operator(name: str) -> Any:
    """``mlip_kernels_cuda::<name>``, defined now; None where the operator has no kernels of its own."""
    if not has_kernels(name):
        return None
    CUDA_LIBRARY.define(_cuda_schemas[name])
    return getattr(torch.ops.mlip_kernels_cuda, name).default


def _warn_if_slow(part: str) -> None:
    """Say once per device type that the reference stands in for kernels which are absent, and how to get them."""
    if part not in PARTS or LOADED[part] == "ok" or DISABLED or part in _warned:
        return
    _warned.add(part)
    warnings.warn(_loading.absence(part), stacklevel=4)


def _first_tensor(arguments: tuple[Any, ...]) -> Tensor:
    return next(argument for argument in arguments if isinstance(argument, Tensor))


def _dtype_of_tokens(arguments: tuple[Any, ...]) -> torch.dtype:
    """Half precision where any tensor has it: masks, weights and some gradients have another dtype than the tokens."""
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.dtype in _HALF_PRECISION:
            return argument.dtype
    return torch.float32


def _device(arguments: tuple[Any, ...]) -> torch.device:
    return _first_tensor(arguments).device


_loading.load()
