"""Every CPU operator on tensors that touch an unreadable page: ``python guard_pages.py``.

An access beyond a buffer usually meets other memory and goes unseen. Here each tensor that an operator of the package
is given lies in pages of its own, so that its last byte (then its first) touches a page without any rights: what goes
beyond it by one byte ends the process. That holds for arguments of forward and backward operators and for what is
written through ``out=``; other results are allocated by PyTorch, and a matter of AddressSanitizer (``make sanitize``).

Prints the signals that end an access beyond either side, and the operators that ran, as JSON.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import itertools
import json
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import mlip_kernels as mk
from mlip_kernels._library import LIBRARY

PROT_NONE = 0
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
PAGE = mmap.PAGESIZE
SIDES = ("last", "first")
LIBC = ctypes.CDLL(None, use_errno=True)
SHAPES = ((1, 1), (3, 5), (8, 17), (34, 33))  # tokens and channels: a tail of one after every width of vectors
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class GuardedMemory:
    """Copies of tensors between two pages without rights."""

    def __init__(self, side: str) -> None:
        self.side = side
        self.maps: list[tuple[mmap.mmap, int, int]] = []

    def copy(self, x: Tensor) -> Tensor:
        """The same values with the same strides."""
        if x.numel() == 0:
            return x
        span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        flat = self.take(span, x.dtype)
        flat.copy_(x.detach().as_strided((span,), (1,), x.storage_offset()))
        return flat.as_strided(x.shape, x.stride())

    def take(self, elements: int, dtype: torch.dtype) -> Tensor:
        size = elements * dtype.itemsize
        pages = -(-size // PAGE)
        memory = mmap.mmap(-1, (pages + 2) * PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (address, address + (pages + 1) * PAGE):
            self._protect(guard, PROT_NONE)
        self.maps.append((memory, address, pages))
        start = address + PAGE + (pages * PAGE - size if self.side == "last" else 0)
        return torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=dtype)

    def release(self) -> None:
        """Give the pages back; no tensor in them may be used any more."""
        for _, address, pages in self.maps:
            for guard in (address, address + (pages + 1) * PAGE):
                self._protect(guard, mmap.PROT_READ | mmap.PROT_WRITE)
        self.maps.clear()

    def _protect(self, address: int, rights: int) -> None:
        if LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), rights) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")


class Guarded(TorchDispatchMode):
    """Gives operators of the package guarded copies of their arguments, and notes which ran."""

    def __init__(self, memory: GuardedMemory, ran: set[str]) -> None:
        super().__init__()
        self.memory, self.ran = memory, ran

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace != LIBRARY.ns:
            return function(*args, **(kwargs or {}))
        if not torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CPU"):
            with self:  # it calls the kernels, which this mode is to see
                return function.redispatch(CPU, *args, **(kwargs or {}))
        self.ran.add(function._opname)
        guarded = tree_map_only(Tensor, self.memory.copy, args)
        result = function(*guarded, **(kwargs or {}))
        for argument, given, used in zip(function._schema.arguments, args, guarded, strict=False):
            if argument.is_write:
                given.copy_(used)
        return result


def cases() -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Calls of every public operator with a CPU kernel, forward and backward, each for several shapes and dtypes."""
    every = [*itertools.product(SHAPES, DTYPES[:2]), *itertools.product(SHAPES[-1:], DTYPES[2:])]
    for (tokens, channels), dtype in every:
        generator = torch.Generator().manual_seed(tokens)

        def random(*shape: int, dtype: torch.dtype = dtype, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        label = f"N={tokens} D={channels} {dtype}"
        for family in (spectral, merging, contrastive):
            for name, call in family(random, tokens, channels):
                yield f"{name} {label}", call


Calls = Iterator[tuple[str, Callable[[], list[Tensor]]]]


def spectral(random: Any, n: int, d: int) -> Calls:
    for prefix, grid in ((0, None), (1, (1, n)), (2, (n, 3))):
        x = random(2, prefix + (n if grid is None else grid[0] * grid[1]), d)
        options = {"grid": grid, "prefix_tokens": prefix}
        axes = [n] if grid is None else list(grid)
        half = [*axes[:-1], axes[-1] // 2 + 1]
        real = random(2, *half, d)
        yield "dct", lambda x=x, o=options: gradients(lambda x: mk.dct(x, **o), x)
        yield "rfft", lambda x=x, o=options: gradients(lambda x: mk.rfft(x, **o), x)
        size = {"n": n} if grid is None else {"grid": grid}
        yield "irfft", lambda r=real, s=size: gradients(lambda a, b: mk.irfft(a, b, **s), r, r.flip(0))
        for basis, kept in (("dct", axes), ("rfft", half)):
            weight = random(*kept, d, *([2] if basis == "rfft" else []))
            bands = torch.arange(math.prod(kept)).reshape(kept) % 3
            given = {**options, "basis": basis}
            filtered = functools.partial(mk.spectral_filter, **given)
            yield "spectral_filter", lambda x=x, w=weight, f=filtered: gradients(f, x, w)
            yield "band_energy", lambda x=x, b=bands, o=given: gradients(lambda x: mk.band_energy(x, b, **o), x)
            yield "token_energy", lambda x=x, o=given: gradients(lambda x: mk.token_energy(x, 0.3, **o), x)
            yield "spectral_filter out", lambda x=x, w=weight, f=filtered: written(f, (x, w), {}, torch.empty_like(x))
        yield "dct out", lambda x=x, o=options: written(mk.dct, (x,), o, torch.empty_like(x))
        yield "idct out", lambda x=x, o=options: written(mk.idct, (x,), o, torch.empty_like(x))
        yield "rfft out", lambda x=x, r=real, o=options: written(mk.rfft, (x,), o, (r.clone(), r.clone()))
        whole = torch.empty_like(x[:, prefix:])
        yield "irfft out", lambda r=real, s=size, w=whole: written(mk.irfft, (r, r), s, w)
        if grid is not None:
            new = {"grid": grid, "new_grid": (3, 2), "prefix_tokens": prefix}
            result = x.new_empty(2, prefix + 6, d)
            yield "spectral_resize out", lambda x=x, o=new, r=result: written(mk.spectral_resize, (x,), o, r)


def merging(random: Any, n: int, d: int) -> Calls:
    x, weight = random(3, n, d), random(3, n, dtype=torch.float32).abs()
    mask = torch.arange(n) < torch.tensor([n, n // 2, 0])[:, None]
    yield "weighted_mean", lambda: gradients(lambda x, w: mk.weighted_mean(x, w), x, weight)
    yield "weighted_mean", lambda: gradients(lambda x: mk.weighted_mean(x, prefix_tokens=n // 2), x)
    for given in ({}, {"mask": mask}, {"guide": random(3, n), "prefix_tokens": 0}):

        def merge(x: Tensor, given: dict[str, Any] = given) -> list[Tensor]:
            plan = mk.merge_plan(x.detach(), n // 2, **given)
            merged, size = plan.merge(x)
            again = mk.merge_plan(merged.detach(), n // 4, prefix_tokens=min(1, n), mask=plan.mask)
            return [merged, size, plan.unmerge(merged), again.merge(merged, size)[0]]

        yield "merge", lambda merge=merge: gradients(merge, x)


def contrastive(random: Any, n: int, d: int) -> Calls:
    images, texts = random(3, n, d), random(2, n + 1, d)
    image_mask = torch.arange(n) < torch.tensor([n, n // 2, 0])[:, None]
    text_mask = torch.arange(n + 1) < torch.tensor([n, 1])[:, None]
    for given in ({}, {"image_mask": image_mask, "text_mask": text_mask}):
        yield "token_logits", lambda o=given: gradients(lambda i, t: mk.token_logits(i, t, **o), images, texts)
    logits = random(n, n)
    for directions in ("both", "rows"):
        yield (
            "pair_cross_entropy",
            lambda d=directions: gradients(lambda x: mk.pair_cross_entropy(x, directions=d), logits),
        )


def gradients(function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """Results and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*leaves)
    results = [results] if isinstance(results, Tensor) else list(results)
    learned = [result for result in results if result.requires_grad]
    found = torch.autograd.grad(learned, leaves, [torch.ones_like(result) for result in learned], allow_unused=True)
    return [*results, *(gradient for gradient in found if gradient is not None)]


def written(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], options: dict[str, Any], out: Any
) -> list[Tensor]:
    function(*inputs, **options, out=out)
    return [out] if isinstance(out, Tensor) else list(out)


def compiled_operators() -> set[str]:
    """The operators that the CPU part implements."""
    names = {name.partition("::")[2] for name in LIBRARY._op_defs}
    return {n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(f"{LIBRARY.ns}::{n}", "CPU")}


def ended_by(side: str) -> int:
    """The signal that ends a process which reads one byte beyond a guarded tensor."""
    if child := os.fork():
        return -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    x = GuardedMemory(side).take(5, torch.float32)
    ctypes.string_at(x.data_ptr() + (x.nbytes if side == "last" else -1), 1)
    os._exit(0)


def main() -> None:
    ran: set[str] = set()
    torch.set_num_threads(1)
    guards = [ended_by(side) for side in SIDES]
    faulthandler.enable()
    for label, call in cases():
        print(label, file=sys.stderr)
        expected = call()
        for side in SIDES:
            memory = GuardedMemory(side)
            with Guarded(memory, ran):
                found = call()
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
            memory.release()
    print(json.dumps({"guards": guards, "ran": sorted(ran), "compiled": sorted(compiled_operators())}))


if __name__ == "__main__":
    main()
