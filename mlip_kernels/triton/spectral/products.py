"""Products of float32 matrices on tensor cores, as accurate as float32 (device code).

bfloat16 has 8 of float32's 24 bits and all of its range, so a float is the sum of three of them: high + middle + low.
Of the nine products of parts six remain, the others are below the rounding of float32: no TF32, and the same number of
tensor-core instructions as three products in TF32, with two bits more. What need not be exact to float32 keeps the
three largest products, with a relative error of 2^-16: for data in bfloat16, with 2^-9.

Small products are added first: an accumulator of the tensor cores rounds towards zero at each addition.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _split(value):
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def multiply(matrix, data, sums, EXACT: tl.constexpr):
    """``sums + matrix @ data`` for float32 [M, K], [K, N] and [M, N]."""
    matrix_high, matrix_middle, matrix_low = _split(matrix)
    data_high, data_middle, data_low = _split(data)
    if EXACT:
        sums = tl.dot(matrix_low, data_high, sums)
        sums = tl.dot(matrix_high, data_low, sums)
        sums = tl.dot(matrix_middle, data_middle, sums)
    sums = tl.dot(matrix_middle, data_high, sums)
    sums = tl.dot(matrix_high, data_middle, sums)
    return tl.dot(matrix_high, data_high, sums)
