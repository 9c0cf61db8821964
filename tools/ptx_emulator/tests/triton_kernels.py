"""Triton kernels that the emulator is tried on, and a way to compile and launch them without a driver."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from ptx_emulator import Emulator, Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def softmax(x, y, stride, n, block: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, block)
    inside = columns < n
    values = tl.load(x + row * stride + columns, mask=inside, other=-float("inf")).to(tl.float32)
    values = tl.exp(values - tl.max(values, axis=0))
    values = values / tl.sum(values, axis=0)
    tl.store(y + row * stride + columns, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def matmul(a, b, c, m, n, k, sam, sak, sbk, sbn, scm, scn, bm: tl.constexpr, bn: tl.constexpr, bk: tl.constexpr):
    rows = tl.program_id(0) * bm + tl.arange(0, bm)
    columns = tl.program_id(1) * bn + tl.arange(0, bn)
    steps = tl.arange(0, bk)
    a_block = a + rows[:, None] * sam + steps[None, :] * sak
    b_block = b + steps[:, None] * sbk + columns[None, :] * sbn
    total = tl.zeros((bm, bn), dtype=tl.float32)
    for step in range(0, k, bk):
        left = tl.load(a_block, mask=(rows[:, None] < m) & (steps[None, :] + step < k), other=0.0)
        right = tl.load(b_block, mask=(steps[:, None] + step < k) & (columns[None, :] < n), other=0.0)
        total = tl.dot(left, right, total)
        a_block += bk * sak
        b_block += bk * sbk
    c_block = c + rows[:, None] * scm + columns[None, :] * scn
    tl.store(c_block, total.to(c.dtype.element_ty), mask=(rows[:, None] < m) & (columns[None, :] < n))


@triton.jit
def argmax_count(x, index, count, total, stride, n, block: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, block)
    values = tl.load(x + row * stride + columns, mask=columns < n, other=-float("inf")).to(tl.float32)
    largest = tl.argmax(values, axis=0)
    tl.store(index + row, largest)
    tl.atomic_add(count + largest, 1)
    tl.atomic_add(total, tl.max(values, axis=0))


@triton.jit
def scatter_rows(source, target, index, d, block: tl.constexpr):
    row = tl.program_id(0)
    to = tl.load(index + row)
    columns = tl.arange(0, block)
    values = tl.load(source + row * d + columns, mask=columns < d, other=0.0)
    tl.atomic_add(target + to * d + columns, values, mask=columns < d)


@triton.jit
def scan_sort(x, sums, ordered, block: tl.constexpr):
    columns = tl.arange(0, block)
    values = tl.load(x + columns)
    tl.store(sums + columns, tl.cumsum(values, axis=0))
    tl.store(ordered + columns, tl.sort(values))


@triton.jit
def add_halves(a, b, y, block: tl.constexpr):
    columns = tl.arange(0, block)
    tl.store(y + columns, tl.load(a + columns) + tl.load(b + columns))


NAMES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Compiled:
    """What a launch needs: the text, and the arguments that remain once constants are specialised."""

    ptx: str
    name: str
    threads: int
    shared: int


@cache
def _compile(function, signature: tuple, constants: tuple, divisible: tuple, arch: int, options: tuple) -> Compiled:
    positions = {name: place for place, name in enumerate(function.arg_names)}
    source = ASTSource(
        fn=function,
        signature=dict(signature),
        constexprs={(positions[name],): value for name, value in constants},
        attrs={(positions[name],): [["tt.divisibility", 16]] for name in divisible},
    )
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))
    warps = made.metadata.num_warps
    return Compiled(made.asm["ptx"], made.metadata.name, 32 * warps, made.metadata.shared)


def compile_for(function, arguments: list, arch: int, *, warps: int = 4, stages: int = 3, **constants):
    """The compiled kernel, specialised as a launch would do it, and the arguments that are left."""
    signature, fixed, divisible, left = {}, dict(constants), [], []
    queue = list(arguments)
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = queue.pop(0)
        if isinstance(value, torch.Tensor):
            signature[name] = NAMES[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif value == 1:
            signature[name], fixed[name] = "constexpr", 1
            continue
        else:
            signature[name], aligned = "i32", value % 16 == 0
        left.append(value)
        if aligned:
            divisible.append(name)
    options = (("num_warps", warps), ("num_stages", stages))
    compiled = _compile(
        function, tuple(signature.items()), tuple(sorted(fixed.items())), tuple(divisible), arch, options
    )
    return compiled, left


def run(compiled: Compiled, arguments: list, grid, arch: int, **emulator) -> Launch:
    """Run it on a fresh emulator."""
    return run_on(Emulator(arch, **emulator), compiled, arguments, grid)


def run_on(emulator: Emulator, compiled: Compiled, arguments: list, grid, *, ptx: str | None = None) -> Launch:
    """Run it, or a changed text of it. Triton's scratch pointers follow the kernel's own arguments."""
    program = emulator.load(ptx or compiled.ptx)
    scratch = [0] * (len(program.kernels[compiled.name].parameters) - len(arguments))
    arguments = [*arguments, *scratch]
    return emulator.launch(program, compiled.name, grid, compiled.threads, arguments, shared=compiled.shared)
