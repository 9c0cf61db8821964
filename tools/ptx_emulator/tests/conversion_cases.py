"""Conversions between every pair of types: cut, extend, saturate, round in each direction."""

from __future__ import annotations

import math
from fractions import Fraction

import number_formats as exact
from edge_values import WIDTHS
from instruction_case import Case, integer, integers, numbers
from number_formats import decode, encode, flush

INTEGERS = tuple(f"{sign}{bits}" for bits in (8, 16, 32, 64) for sign in "us")
FLOATS = ("f16", "bf16", "f32", "f64")
INTEGER_ROUNDINGS = {"rni": "rn", "rzi": "rz", "rmi": "rm", "rpi": "rp"}


def limits(kind: str) -> tuple[int, int]:
    bits = WIDTHS[kind]
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def clamp(value: int, kind: str) -> int:
    low, high = limits(kind)
    return min(max(value, low), high)


def float_to_integer(pattern: int, source: str, target: str, rounding: str, flushing: bool) -> int:
    """Out of range saturates; NaN is 0 unless either type has 64 bits, and then the sign bit alone."""
    number = decode(source, flush(source, pattern) if flushing else pattern)
    bits = WIDTHS[target]
    if isinstance(number, float):
        if math.isnan(number):
            return 1 << (bits - 1) if source == "f64" or bits == 64 else 0
        value = 0 if number == 0 else limits(target)[number > 0]
    else:
        value = int(exact.to_integral(number, rounding))
    return clamp(value, target) & ((1 << bits) - 1)


def integer_to_float(value: int, target: str, rounding: str) -> int:
    return encode(target, Fraction(value) if value else 0.0, rounding)


def _between_integers() -> list[Case]:
    cases = []
    for target in INTEGERS:
        for source in INTEGERS:
            cases.append(integers(f"cvt.{target}.{source}", source, target, lambda a: a))
            if limits(source)[0] < limits(target)[0] or limits(source)[1] > limits(target)[1]:
                name = f"cvt.sat.{target}.{source}"
                cases.append(integers(name, source, target, lambda a, t=target: clamp(a, t)))
    for target in ("u8", "s8", "u16", "s16"):

        def extended(a: int, target: str = target) -> int:
            return integer(a, target) & 0xFFFFFFFF

        cases.append(Case(f"cvt.{target}.s32", ("s32",), ("b32",), extended, note="into a wider register"))
    return cases


def _to_and_from_integers() -> list[Case]:
    cases = []
    for real in FLOATS:
        for whole in INTEGERS:
            if real == "bf16" and WIDTHS[whole] == 8:
                continue  # PTX has no such conversion
            for name, rounding in INTEGER_ROUNDINGS.items():
                for ftz in ("", ".ftz") if real == "f32" else ("",):
                    flushing = bool(ftz)
                    cases.append(
                        Case(
                            f"cvt.{name}{ftz}.{whole}.{real}",
                            (real,),
                            (whole,),
                            lambda a, s=real, t=whole, r=rounding, f=flushing: float_to_integer(a, s, t, r, f),
                        )
                    )
            for rounding in ("rn", "rz", "rm", "rp"):
                cases.append(
                    Case(
                        f"cvt.{rounding}.{real}.{whole}",
                        (whole,),
                        (real,),
                        lambda a, s=whole, t=real, r=rounding: integer_to_float(integer(a, s), t, r),
                    )
                )
    return cases


def _same(a: exact.Number) -> exact.Number:
    return a


def _between_floats() -> list[Case]:
    cases = []
    narrowing = (("f32", "f64"), ("f16", "f32"), ("f16", "f64"), ("bf16", "f32"), ("bf16", "f64"), ("bf16", "f16"))
    for target, source in (*narrowing, ("f16", "bf16")):
        for rounding in ("rn", "rz", "rm", "rp"):
            if source == "f32" and rounding in ("rm", "rp") and target == "bf16":
                continue
            name = f"cvt.{rounding}.{target}.{source}"
            cases.append(numbers(name, source, target, _same, rounding=rounding))
    for rounding in ("rn", "rz"):
        for target in ("f16", "bf16"):
            name = f"cvt.{rounding}.relu.{target}.f32"
            cases.append(numbers(name, "f32", target, _same, rounding=rounding))
    for target, source in (("f64", "f32"), ("f64", "f16"), ("f32", "f16"), ("f32", "bf16"), ("f64", "bf16")):
        cases.append(numbers(f"cvt.{target}.{source}", source, target, _same))
    cases += [
        numbers("cvt.rn.ftz.f32.f64", "f64", "f32", _same),
        numbers("cvt.rn.ftz.f16.f32", "f32", "f16", _same),
        numbers("cvt.ftz.f64.f32", "f32", "f64", _same),
        numbers("cvt.sat.f32.f32", "f32", "f32", _same),
        numbers("cvt.ftz.sat.f32.f32", "f32", "f32", _same),
        numbers("cvt.rn.sat.f32.f64", "f64", "f32", _same),
        numbers("cvt.rn.sat.f16.f32", "f32", "f16", _same),
        numbers("cvt.sat.f64.f64", "f64", "f64", _same),
        numbers("cvt.sat.f32.f16", "f16", "f32", _same),
    ]
    for kind in ("f16", "f32", "f64"):
        for name, rounding in INTEGER_ROUNDINGS.items():
            for ftz in ("", ".ftz") if kind == "f32" else ("",):
                text = f"cvt.{name}{ftz}.{kind}.{kind}"
                cases.append(numbers(text, kind, kind, lambda a, r=rounding: exact.to_integral(a, r)))
    return cases


def _packed_and_tensor() -> list[Case]:
    cases = []
    for target in ("f16", "bf16"):
        for rounding in ("rn", "rz"):
            for relu in ("", ".relu"):

                def both(a: int, b: int, target=target, rounding=rounding, relu=relu) -> int:
                    halves = []
                    for pattern in (b, a):  # the first operand is the upper half
                        half = encode(target, decode("f32", pattern), rounding)
                        negative = half >> 15 and not exact.is_nan(target, half)
                        halves.append(0 if relu and negative else half)
                    return halves[0] | halves[1] << 16

                name = f"cvt.{rounding}{relu}.{target}x2.f32"
                cases.append(Case(name, ("f32", "f32"), (f"{target}x2",), both))
    for rounding in ("rna", "rn", "rz"):
        name = f"cvt.{rounding}.tf32.f32"
        cases.append(numbers(name, "f32", "tf32", _same, rounding=rounding))
    cases.append(numbers("cvt.rn.relu.tf32.f32", "f32", "tf32", _same))
    return cases


CASES = _between_integers() + _to_and_from_integers() + _between_floats() + _packed_and_tensor()
