"""Which lane holds which element of a matrix operand, after the figures of the PTX ISA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from number_formats import decode, encode

BITS = {"f16": 16, "bf16": 16, "tf32": 32, "f32": 32, "f64": 64, "s32": 32, "s8": 8, "u8": 8, "s4": 4, "u4": 4, "b1": 1}
Place = tuple[int, int, int]
"""Register, position of the element in it, and with the lane: a row and a column."""


@dataclass(frozen=True)
class Shape:
    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"m{self.m}n{self.n}k{self.k}"


def multiplicand_a(shape: Shape, kind: str) -> np.ndarray:
    """``[lane, register, element] -> (row, column)`` of A."""
    bits = BITS[kind]
    each = max(32 // bits, 1)
    registers = shape.m * shape.k // 32 // each
    places = np.zeros((32, registers, each, 2), int)
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for register in range(registers):
            upper, step = (register & 1, register >> 1) if shape.m == 16 else (0, register)
            for element in range(each):
                places[lane, register, element] = group + 8 * upper, thread * each + element + step * 4 * each
    return places


def multiplicand_b(shape: Shape, kind: str) -> np.ndarray:
    """``[lane, register, element] -> (row, column)`` of B, which is k by n."""
    each = max(32 // BITS[kind], 1)
    registers = shape.n * shape.k // 32 // each
    places = np.zeros((32, registers, each, 2), int)
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for register in range(registers):
            for element in range(each):
                places[lane, register, element] = thread * each + element + register * 4 * each, group
    return places


def accumulator(shape: Shape, kind: str) -> np.ndarray:
    """``[lane, register, element] -> (row, column)`` of C and D, of the rows that one warp holds."""
    rows = min(shape.m, 16)
    each = 2 if kind == "f16" else 1
    registers = rows * shape.n // 32 // each
    places = np.zeros((32, registers, each, 2), int)
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for register in range(registers):
            for element in range(each):
                index = register * each + element
                upper, step = (index >> 1 & 1, index >> 2) if rows == 16 else (0, index >> 1)
                places[lane, register, element] = group + 8 * upper, 8 * step + 2 * thread + (index & 1)
    return places


def to_pattern(kind: str, value: float) -> int:
    """A number as the bits of an element."""
    if kind in ("s8", "u8", "s4", "u4", "s32", "b1"):
        return int(value) & ((1 << BITS[kind]) - 1)
    return encode(kind, Fraction(value) if value and math.isfinite(value) else float(value))


def from_pattern(kind: str, pattern: int) -> float:
    if kind == "s32":
        return float(np.uint32(pattern).view(np.int32))
    return float(decode(kind, pattern))


def pack(matrix: np.ndarray, places: np.ndarray, kind: str) -> np.ndarray:
    """A matrix as registers, ``[lane, register]``."""
    lanes, registers, each, _ = places.shape
    words = np.zeros((lanes, registers), np.uint64)
    for lane in range(lanes):
        for register in range(registers):
            for element in range(each):
                row, column = places[lane, register, element]
                bits = to_pattern(kind, matrix[row, column])
                words[lane, register] |= np.uint64(bits << (BITS[kind] * element))
    return words if BITS[kind] == 64 else words.astype(np.uint32)


def unpack(words: np.ndarray, places: np.ndarray, kind: str) -> np.ndarray:
    """The matrix that registers ``[lane, register]`` hold."""
    lanes, registers, each, _ = places.shape
    matrix = np.full(places.reshape(-1, 2).max(0) + 1, np.nan)
    mask = (1 << BITS[kind]) - 1
    for lane in range(lanes):
        for register in range(registers):
            for element in range(each):
                row, column = places[lane, register, element]
                matrix[row, column] = from_pattern(kind, int(words[lane, register]) >> (BITS[kind] * element) & mask)
    return matrix
