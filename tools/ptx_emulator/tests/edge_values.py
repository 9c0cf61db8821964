"""The operands that instructions go wrong on, as bit patterns."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

from number_formats import CANONICAL_NAN, FORMATS, encode

WIDTHS = {"b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "b32": 32, "u32": 32, "s32": 32}
WIDTHS |= {"b64": 64, "u64": 64, "s64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "tf32": 32}
WIDTHS |= {"f16x2": 32, "bf16x2": 32, "pred": 8, "shift": 32, "byte": 32, "u24": 32, "s24": 32}

HALVES = {"f16x2": "f16", "bf16x2": "bf16"}
"""Packed types, and the type of one half."""


def integers(bits: int) -> list[int]:
    """Zero, one, the extremes of both signednesses, powers of two and their neighbours, patterns of bits."""
    top = 1 << bits
    powers = [(1 << n) + d for n in {0, 1, 4, bits // 2 - 1, bits // 2, bits - 1} for d in (-1, 0, 1)]
    patterns = [0x5555555555555555, 0xAAAAAAAAAAAAAAAA, 0x0123456789ABCDEF, 0xFEDCBA9876543210]
    values = [0, 1, 2, 3, 7, 100, top - 1, top - 2, top // 2, top // 2 - 1, top - 100, *powers, *patterns]
    return sorted({value % top for value in values})


def floats(name: str) -> list[int]:
    """Zeros, ones, extremes, subnormals, infinities, NaN, halves, and neighbours of powers of two."""
    form = FORMATS[name]
    smallest_normal = 1 << form.mantissa
    one = encode(name, Fraction(1)) >> form.padding
    patterns = [0, 1, smallest_normal - 1, smallest_normal // 2 + 1, smallest_normal, smallest_normal + 1]
    patterns += [form.infinity - 1, form.infinity, one, one + 1, one - 1, one + 3]
    patterns += [one + (4 << form.mantissa), one + (4 << form.mantissa) - 1, one - (form.mantissa + 1 << form.mantissa)]
    patterns = [p << form.padding for p in patterns]
    patterns += [encode(name, Fraction(n, 2)) for n in (1, 3, 5, 7)] + [encode(name, Fraction(1, 3))]
    patterns += [encode(name, Fraction(n)) for n in (3, 100, 255, 256)]
    both = [p | s for p in patterns for s in (0, form.sign << form.padding)]
    return sorted({*both, CANONICAL_NAN[name], form.sign << form.padding | CANONICAL_NAN[name]})


def conversions(name: str) -> list[int]:
    """``floats``, and what lies at the edges and half-way points of every type that one converts to."""
    values = {*floats(name)}
    for bits in (8, 16, 32, 64):
        for edge in (1 << bits, 1 << (bits - 1)):
            for step in (Fraction(-1), Fraction(-1, 2), Fraction(0), Fraction(1, 2), Fraction(1)):
                for sign in (1, -1):
                    exact = encode(name, sign * (edge + step), "rz")
                    values |= {exact, exact + 1, exact - 1}
    for narrow in FORMATS.values():
        if narrow.bits - narrow.padding < FORMATS[name].bits:
            ulp = Fraction(1, 1 << narrow.mantissa)
            tiny = Fraction(2) ** (2 - (1 << (narrow.exponent - 1)) - narrow.mantissa)
            largest = (2 - ulp) * Fraction(2) ** narrow.bias
            halfway = [1 + ulp / 2, 1 + 3 * ulp / 2, tiny / 2, 3 * tiny / 2, tiny, largest, largest * (1 + ulp / 4)]
            halfway += [largest + ulp / 2 * Fraction(2) ** narrow.bias, tiny * (1 << narrow.mantissa) - tiny / 2]
            for value in halfway:
                exact = encode(name, value, "rz")
                values |= {exact, exact + 1, max(exact - 1, 0), exact | FORMATS[name].sign}
    return sorted(v for v in values if 0 <= v < 1 << WIDTHS[name])


def edges(kind: str) -> list[int]:
    """Edge values of a type, or of one of the roles ``shift`` (amounts), ``byte`` and ``pred``."""
    if kind in HALVES:
        single = floats(HALVES[kind])
        return [low | single[(7 * n + 3) % len(single)] << 16 for n, low in enumerate(single)]
    if kind in FORMATS:
        return floats(kind)
    if kind == "pred":
        return [0, 1]
    if kind == "shift":
        return [0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 0x80000000, 0xFFFFFFFF]
    if kind == "byte":
        return [0, 1, 4, 7, 8, 16, 24, 31, 32, 40, 64, 255, 256, 0x120]
    return integers(WIDTHS[kind])


def rows(kinds: tuple[str, ...], *, limit: int = 640, seed: int = 0) -> list[tuple[int, ...]]:
    """Operand tuples: every pair of edge values of up to two operands as far as they fit, else a sample, and noise."""
    generator = random.Random(f"{kinds} {seed}")
    lists = [edges(kind) for kind in kinds]
    if len(kinds) == 1 and kinds[0] in FORMATS:
        lists = [conversions(kinds[0])]
    total = 1
    for values in lists:
        total *= len(values)
    if total <= limit:
        chosen = list(itertools.product(*lists))
    else:
        chosen = [tuple(generator.choice(values) for values in lists) for _ in range(limit)]
    for _ in range(96):
        chosen.append(tuple(_noise(kind, generator) for kind in kinds))
    return chosen


def _noise(kind: str, generator: random.Random) -> int:
    if kind in ("pred", "shift", "byte"):
        return generator.choice(edges(kind))
    if kind in HALVES:
        return _noise(HALVES[kind], generator) | _noise(HALVES[kind], generator) << 16
    if kind in FORMATS:
        return encode(kind, Fraction(generator.uniform(-4, 4)) * Fraction(2) ** generator.randint(-12, 12))
    return generator.getrandbits(WIDTHS[kind])
