"""One operator, one class: a ``torch.autograd.Function`` that torch's dispatcher runs.

    public function, Function.apply ─► check ─► plain PyTorch       in use_reference(), under torch.func, with tangents
                                            ├─► a node of a graph   while torch.compile or torch.export traces
                                            └─► the dispatcher ─► C++, Triton or CUDA C++ (`_library`)

`Operator.call` holds this switch, the only one. A backward pass runs on what its forward pass ran on, because plain
PyTorch is recorded as plain PyTorch, and a kernel as its class.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C import _after_autograd_keyset, _any_requires_grad, _AutoDispatchBelowAutograd
from torch.autograd import forward_ad

from mlip_kernels._library import LIBRARY, define, define_out, refuse_tangents

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
    """Whether plain PyTorch has to compute: it was asked for, or it alone can be transformed."""
    return _transformed() or forward_ad._current_level >= 0 or reference_requested()


def _transformed() -> bool:
    """Whether a transform of ``torch.func`` is active."""
    return torch._C._are_functorch_transforms_active()


# What torch.compiler.assume_constant_result sets, without its import of the compiler. torch.compile asks while it
# traces, when the transforms that it traces are active, and has the answer as a constant, not as a node in every graph.
_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


_TENSORS = (Tensor, torch.nn.Parameter)


class Operator(torch.autograd.Function):
    """Schema, plain PyTorch, fake and gradient of one operator. Defining a subclass registers it.

    A subclass states what is below; every method is static. ``Subclass.call(...)`` and ``Subclass.apply(...)`` take the
    arguments of `check`; ``torch.ops.mlip_kernels.<name>(...)`` takes what `check` returns. All of them work in eager
    mode, under ``torch.compile(fullgraph=True)`` and in ``torch.export``, where the operator is one node.

    ``save`` is ``setup_context`` under another name: with that one, ``apply`` inspects a signature at every call. What
    is not implemented raises. Without `gradients`, a derivative is refused, where it would otherwise silently be zero.
    """

    schema: ClassVar[str]
    """Name, arguments without defaults, and results, as in ``native_functions.yaml``."""
    triton: ClassVar[str | None] = None
    """``"module:function"`` of the Triton launcher, imported at the first CUDA call."""
    kernels: ClassVar[bool] = True
    """Whether kernels are registered under this very name; without, `compute` is what runs everywhere, by design."""
    results: ClassVar[int | None] = None
    """How many leading results the caller sees, a single one not as a tuple; the others serve `gradients`. None: all,
    as they are."""

    differentiable: ClassVar[int | None] = None
    """How many leading results have a gradient; None: all. `gradients` gets None for a result that nothing used."""
    out: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that ``mlip_kernels::<name>_out`` writes its results to, where there is one."""

    compute: Callable[..., Any]
    """The operator where there is no kernel, without autograd; returns contiguous tensors."""
    fake: Callable[..., Any]
    """Shapes and dtypes of the results, for tracing."""
    plain: Callable[..., Any]
    """The definition of right: what the caller sees, in differentiable PyTorch."""
    op: Any
    """``torch.ops.mlip_kernels.<name>.default``."""
    run: Callable[..., Any]
    """``run(*checked)``: the operator for arguments that are checked, with all of its results; gradients call this."""
    call: Callable[..., Any]
    """What the public function calls: checks, then the one way or the other. ``apply`` is the same."""
    call_into: Callable[..., None]
    """``call_into(out, *checked)``: the same into the tensors ``out``, for arguments that are checked."""
    write: Callable[..., None] | None = None
    """``write(*arguments, *out)`` computes in the given tensors. None: the results are computed, then copied."""

    @staticmethod
    def check(*arguments: Any) -> tuple[Any, ...]:
        """The operator's arguments. Those of the caller come first, in their order; what is differentiated stays."""
        return arguments

    @staticmethod
    def takes(*arguments: Any) -> bool:
        """Whether the kernels compute this; plain PyTorch does otherwise."""
        return True

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what `gradients` needs."""

    @staticmethod
    def gradients(ctx: Any, *incoming: Any) -> Any:
        """One gradient, or None, for each of the leading arguments; the rest get None."""
        raise NotImplementedError

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """`call`; only ``torch.compile`` does not see it, and traces `forward` and `backward`."""
        return cls.call(*arguments)

    def __init_subclass__(cls) -> None:
        if "schema" not in vars(cls):  # one that records, made below
            return
        op = define(cls.schema, reference=cls.compute, fake=cls.fake, triton=cls.triton, kernels=cls.kernels)
        name, shown, check, plain, takes, save = op._opname, cls.results, cls.check, cls.plain, cls.takes, cls.save
        kernels, compute = cls.kernels, cls.compute
        differentiable, listed = cls.differentiable, isinstance(op._schema.returns[0].type, torch.ListType)
        gradients = cls.gradients if cls.gradients is not Operator.gradients else functools.partial(_refuse, name)

        def seen(results: Any) -> Any:
            if shown is None:
                return results
            return results[0] if shown == 1 else results[:shown]

        def keep(ctx: Any, given: int, arguments: tuple[Any, ...], results: Any, returned: Any) -> Any:
            ctx.given = given
            if differentiable is not None:
                ctx.set_materialize_grads(False)
                if isinstance(returned, tuple):
                    ctx.mark_non_differentiable(*returned[differentiable:])
            save(ctx, arguments, results)
            return returned

        def forward(ctx: Any, *given: Any) -> Any:
            arguments = check(*given)
            results = op(*arguments)
            return keep(ctx, len(given), arguments, results, seen(results))

        def evaluate(arguments: tuple[Any, ...]) -> Any:
            """The operator below autograd. Where nothing can notice, one without kernels is spared the dispatcher."""
            with _AutoDispatchBelowAutograd():
                return op(*arguments) if kernels or _watched(arguments) else compute(*arguments)

        def forward_checked(ctx: Any, *arguments: Any) -> Any:
            results = evaluate(arguments)
            results = tuple(results) if listed else results  # autograd looks for results in tuples only
            return keep(ctx, len(arguments), arguments, results, results)

        def backward(ctx: Any, *incoming: Any) -> Any:
            found = gradients(ctx, *incoming)
            found = found if isinstance(found, tuple) else (found,)
            return (*found, *(None,) * (ctx.given - len(found)))

        @functools.cache
        def recorded() -> Callable[..., Any]:
            members = {"forward": staticmethod(forward_checked), "backward": staticmethod(backward)}
            return _apply(type(cls.__name__, (cls,), members))

        def recording(arguments: tuple[Any, ...]) -> Any:
            results = recorded()(*arguments)
            return list(results) if listed else results

        def call(*given: Any) -> Any:
            arguments = check(*given)
            if plain_needed() or not takes(*arguments):
                return plain(*arguments)
            return seen(run(*arguments))

        def run(*arguments: Any) -> Any:
            if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
                return op(*arguments)
            if torch.is_grad_enabled() and _any_requires_grad(*arguments):
                return recording(arguments)
            return evaluate(arguments)

        def record(keys: Any, *arguments: Any) -> Any:
            if forward_ad._current_level >= 0:
                refuse_tangents(name, arguments)
            if torch.is_grad_enabled() and _any_requires_grad(*arguments):
                return recording(arguments)
            with _AutoDispatchBelowAutograd():
                return op.redispatch(keys & _after_autograd_keyset, *arguments)

        def call_into(out: tuple[Tensor, ...], *arguments: Any) -> None:
            if takes(*arguments) and not plain_needed():
                op_out(*arguments, *out)
                return
            results = plain(*arguments)
            for given, result in zip(out, results if len(out) > 1 else (results,), strict=True):
                given.copy_(result)

        if cls.out:
            op_out = define_out(name, *cls.out, write=cls.write)
            cls.call_into = staticmethod(call_into)
        cls.op, cls.run, cls.call = staticmethod(op), staticmethod(run), staticmethod(call)
        cls.forward, cls.backward = staticmethod(forward), staticmethod(backward)  # type: ignore[method-assign]
        LIBRARY.impl(name, record, "Autograd", with_keyset=True)


def _watched(arguments: tuple[Any, ...]) -> bool:
    """Whether a mode, or a tensor of another type, wants to see which operators are called."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    return any(isinstance(argument, Tensor) and type(argument) not in _TENSORS for argument in arguments)


def needed(ctx: Any, *positions: int) -> tuple[bool, ...]:
    """Whether the arguments at these positions need a gradient; those that the caller left out need none."""
    given = ctx.needs_input_grad
    return tuple(position < len(given) and given[position] for position in positions)


def define_backward(
    schema: str,
    *,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    triton: str | None = None,
    kernels: bool = True,
) -> Callable[..., Any]:
    """Define an operator that computes a gradient and has none itself, and return what calls it.

    The arguments are the attributes of an `Operator`.
    """
    name = schema.partition("(")[0]
    methods = {"compute": staticmethod(compute), "fake": staticmethod(fake), "plain": staticmethod(compute)}
    made: Any = type(name, (Operator,), {"schema": schema, "triton": triton, "kernels": kernels, **methods})
    return made.run


def _apply(function: Any) -> Callable[..., Any]:
    """``torch.autograd.Function.apply`` of a class that has an ``apply`` of its own."""
    return super(Operator, function).apply


def _refuse(name: str, ctx: Any, *incoming: Any) -> Any:
    raise RuntimeError(
        f"mlip_kernels::{name} has no second derivative; compute it inside `with mlip_kernels.use_reference():`"
    )
