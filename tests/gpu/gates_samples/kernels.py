"""Triton kernels with one virtue or one vice each, for the gates to notice."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x, y, size, stride: tl.constexpr, block: tl.constexpr):
    """With stride 1, neighbours lie together; otherwise so many elements apart."""
    i = tl.program_id(0) * block + tl.arange(0, block)
    position = i % (size // stride) * stride + i // (size // stride)
    tl.store(y + position, tl.load(x + position))


@triton.jit
def plain_copy_kernel(x, y, size, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(y + i, tl.load(x + i, mask=i < size), mask=i < size)


@triton.jit
def product_kernel(a, b, c, block: tl.constexpr, precision: tl.constexpr):
    """[block, block] matrices; of c, the first 16 x 16 elements are stored."""
    row, column = tl.arange(0, block)[:, None], tl.arange(0, block)[None, :]
    inside = (row < 16) & (column < 16)
    left = tl.load(a + row * 16 + column, mask=inside, other=0.0)
    right = tl.load(b + row * 16 + column, mask=inside, other=0.0)
    tl.store(c + row * 16 + column, tl.dot(left, right, input_precision=precision), mask=inside)


@triton.jit
def greedy_kernel(x, y, rows: tl.constexpr, columns: tl.constexpr):
    """Holds rows x columns numbers at once."""
    at = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    values = tl.load(x + at)
    largest = tl.max(values)
    tl.store(y + at, values / largest)


@triton.jit
def atomic_kernel(x, y, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    tl.atomic_add(y + i % 4, tl.load(x + i))


@triton.jit
def labelled_copy_kernel(x, y, label, block: tl.constexpr):
    """No instruction depends on the label."""
    i = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(y + i, tl.load(x + i))
