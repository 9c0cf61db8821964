"""Floating-point formats as exact rational arithmetic: what the emulator's arithmetic is measured against.

A finite number is a ``Fraction``; zeros, infinities and NaN are Python floats. Every operation is exact and rounded
once, by ``encode``, so that nothing here depends on how a processor or a library rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

Number = Fraction | float


@dataclass(frozen=True)
class Format:
    """An IEEE 754 binary format, stored in the upper bits of a word that is ``padding`` bits wider."""

    name: str
    exponent: int
    mantissa: int
    padding: int = 0

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa + self.padding

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def infinity(self) -> int:
        """The pattern of +inf, without sign, before padding."""
        return ((1 << self.exponent) - 1) << self.mantissa

    @property
    def sign(self) -> int:
        return 1 << (self.exponent + self.mantissa)


F16 = Format("f16", 5, 10)
BF16 = Format("bf16", 8, 7)
F32 = Format("f32", 8, 23)
F64 = Format("f64", 11, 52)
TF32 = Format("tf32", 8, 10, padding=13)
FORMATS = {f.name: f for f in (F16, BF16, F32, F64, TF32)}

CANONICAL_NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FF8000000000000, "tf32": 0x7FFFE000}


@cache
def decode(name: str, pattern: int) -> Number:
    """The number that a bit pattern stands for."""
    form = FORMATS[name]
    pattern >>= form.padding
    negative, magnitude = bool(pattern & form.sign), pattern & (form.sign - 1)
    if magnitude >= form.infinity:
        return math.nan if magnitude > form.infinity else -math.inf if negative else math.inf
    if magnitude == 0:
        return -0.0 if negative else 0.0
    exponent, fraction = magnitude >> form.mantissa, magnitude & ((1 << form.mantissa) - 1)
    if exponent:
        fraction |= 1 << form.mantissa
    scale = max(exponent, 1) - form.bias - form.mantissa
    value = Fraction(fraction << scale) if scale >= 0 else Fraction(fraction, 1 << -scale)
    return -value if negative else value


def encode(name: str, value: Number, rounding: str = "rn") -> int:
    """The bit pattern of ``value`` rounded once: ``rn`` to nearest even, ``rna`` ties away, ``rz``, ``rm``, ``rp``."""
    form = FORMATS[name]
    if isinstance(value, float):
        if math.isnan(value):
            return CANONICAL_NAN[name]
        sign = form.sign if math.copysign(1.0, value) < 0 else 0
        return (sign | (form.infinity if value else 0)) << form.padding
    negative = value < 0
    numerator, denominator = abs(value.numerator), value.denominator
    exponent = numerator.bit_length() - denominator.bit_length()
    if numerator << max(-exponent, 0) < denominator << max(exponent, 0):
        exponent -= 1
    exponent = max(exponent, 1 - form.bias)
    shift = form.mantissa - exponent
    divisor = denominator << max(-shift, 0)
    quotient, rest = divmod(numerator << max(shift, 0), divisor)
    towards_zero = rounding == "rz" or rounding == ("rp" if negative else "rm")
    if rounding in ("rn", "rna"):
        up = 2 * rest > divisor or (2 * rest == divisor and (rounding == "rna" or quotient & 1))
    else:
        up = rest > 0 and not towards_zero
    pattern = ((exponent - 1 + form.bias) << form.mantissa) + quotient + up
    if pattern >= form.infinity:
        pattern = form.infinity - 1 if towards_zero else form.infinity
    return (pattern | (form.sign if negative else 0)) << form.padding


def is_nan(name: str, pattern: int) -> bool:
    form = FORMATS[name]
    return (pattern >> form.padding) & (form.sign - 1) > form.infinity


def is_negative(value: Number) -> bool:
    return value < 0 if isinstance(value, Fraction) else math.copysign(1.0, value) < 0


def flush(name: str, pattern: int) -> int:
    """A subnormal becomes a zero of the same sign."""
    form = FORMATS[name]
    return pattern if pattern & form.infinity else pattern & form.sign


def as_float(value: Number) -> float:
    """A stand-in with the same sign and class, for what the special values decide alone."""
    return math.copysign(1.0, value) if isinstance(value, Fraction) else value


def add(a: Number, b: Number, rounding: str = "rn") -> Number:
    if isinstance(a, float) and isinstance(b, float):
        if a == 0 and b == 0 and rounding == "rm":
            return -0.0 if is_negative(a) or is_negative(b) else 0.0
        return a + b
    if isinstance(a, float):
        a, b = b, a
    if isinstance(b, float):
        return a if b == 0 else b
    total = a + b
    return total if total else -0.0 if rounding == "rm" else 0.0


def negate(a: Number) -> Number:
    return -a


def multiply(a: Number, b: Number) -> Number:
    if isinstance(a, float) or isinstance(b, float):
        return as_float(a) * as_float(b)
    return a * b


def fused(a: Number, b: Number, c: Number, rounding: str = "rn") -> Number:
    return add(multiply(a, b), c, rounding)


def divide(a: Number, b: Number) -> Number:
    if isinstance(b, float) and b == 0:
        if isinstance(a, float) and (a == 0 or math.isnan(a)):
            return math.nan
        return -math.inf if is_negative(a) != is_negative(b) else math.inf
    if isinstance(a, float) or isinstance(b, float):
        return as_float(a) / as_float(b)
    return a / b


def square_root(a: Number) -> Number:
    """Correct to far more bits than any format has; an inexact root ends in a sticky bit."""
    if isinstance(a, float):
        return math.nan if a < 0 else a if a == 0 else math.sqrt(a) if not math.isnan(a) else math.nan
    if a < 0:
        return math.nan
    scale = 128 + max(0, a.denominator.bit_length())
    square = (a.numerator << (2 * scale)) // a.denominator
    root = math.isqrt(square)
    exact = root * root == square and (a.numerator << (2 * scale)) % a.denominator == 0
    return Fraction(2 * root + (not exact), 2 << scale)


def to_integral(a: Number, rounding: str) -> Number:
    """Round to an integer; a result of zero keeps the sign."""
    if isinstance(a, float):
        return a
    if rounding == "rn":
        whole = round(a)
    else:
        down = rounding == "rm" or (rounding == "rz" and a > 0)
        whole = math.floor(a) if down else math.ceil(a)
    return Fraction(whole) if whole else -0.0 if a < 0 else 0.0


def smallest(a: Number, b: Number, *, nan: bool = False) -> Number:
    """The smaller one; -0 is below +0; a NaN loses against a number, unless ``nan``."""
    if any(isinstance(x, float) and math.isnan(x) for x in (a, b)):
        numbers = [x for x in (a, b) if not (isinstance(x, float) and math.isnan(x))]
        return math.nan if nan or not numbers else numbers[0]
    if a == b:
        return a if is_negative(a) else b
    return min(a, b)


def largest(a: Number, b: Number, *, nan: bool = False) -> Number:
    return -smallest(-a, -b, nan=nan)


def saturate(a: Number) -> Number:
    """Clamp to [0, 1]; NaN becomes +0."""
    if isinstance(a, float) and math.isnan(a):
        return 0.0
    return 0.0 if is_negative(a) or a == 0 else min(a, Fraction(1))
