"""Floating-point arithmetic whose result IEEE 754 and the PTX ISA fix to the last bit."""

from __future__ import annotations

from fractions import Fraction

import number_formats as exact
from edge_values import WIDTHS
from instruction_case import Case, numbers
from number_formats import FORMATS

ROUNDINGS = ("rn", "rz", "rm", "rp")
HALF_TYPES = ("f16", "bf16", "f16x2", "bf16x2")


def _arithmetic() -> list[Case]:
    cases = []

    def add(name: str, kind: str, operands: int, function, rounding: str = "rn") -> None:
        cases.append(numbers(name, " ".join([kind] * operands), kind, function, rounding=rounding))

    for t in ("f32", "f64"):
        for r in ("", *ROUNDINGS):
            mode, dot = r or "rn", f".{r}" if r else ""
            for ftz in ("", ".ftz") if t == "f32" else ("",):
                for sat in ("", ".sat") if t == "f32" else ("",):
                    suffix = f"{dot}{ftz}{sat}.{t}"
                    add(f"add{suffix}", t, 2, lambda a, b, m=mode: exact.add(a, b, m), mode)
                    add(f"sub{suffix}", t, 2, lambda a, b, m=mode: exact.add(a, -b, m), mode)
                    add(f"mul{suffix}", t, 2, exact.multiply, mode)
                    if r:
                        add(f"fma{suffix}", t, 3, lambda a, b, c, m=mode: exact.fused(a, b, c, m), mode)
                        add(f"mad{suffix}", t, 3, lambda a, b, c, m=mode: exact.fused(a, b, c, m), mode)
                if r:
                    suffix = f".{r}{ftz}.{t}"
                    add(f"div{suffix}", t, 2, exact.divide, mode)
                    add(f"rcp{suffix}", t, 1, lambda a: exact.divide(Fraction(1), a), mode)
                    add(f"sqrt{suffix}", t, 1, exact.square_root, mode)
    for t in HALF_TYPES:
        ftzs = ("", ".ftz") if t.startswith("f16") else ("",)
        sats = ("", ".sat") if t.startswith("f16") else ("",)
        for ftz in ftzs:
            for sat in sats:
                for r in ("", ".rn"):
                    suffix = f"{r}{ftz}{sat}.{t}"
                    add(f"add{suffix}", t, 2, exact.add)
                    add(f"sub{suffix}", t, 2, lambda a, b: exact.add(a, -b))
                    add(f"mul{suffix}", t, 2, exact.multiply)
                add(f"fma.rn{ftz}{sat}.{t}", t, 3, exact.fused)
            add(f"fma.rn{ftz}.relu.{t}", t, 3, exact.fused)
    return cases


def _extremes() -> list[Case]:
    cases = []
    for t in ("f32", "f64", *HALF_TYPES):
        flushing = ("", ".ftz") if t in ("f32", "f16", "f16x2") else ("",)
        nans = (False, True) if t != "f64" else (False,)
        for ftz in flushing:
            for nan in nans:
                suffix = f"{ftz}{'.NaN' if nan else ''}"
                two = f"{t} {t}"
                cases.append(numbers(f"min{suffix}.{t}", two, t, lambda a, b, n=nan: exact.smallest(a, b, nan=n)))
                cases.append(numbers(f"max{suffix}.{t}", two, t, lambda a, b, n=nan: exact.largest(a, b, nan=n)))
                if t == "f64":
                    continue
                for name, choose in (("min", exact.smallest), ("max", exact.largest)):
                    cases.append(
                        numbers(
                            f"{name}{suffix}.xorsign.abs.{t}", two, t, lambda a, b, f=choose, n=nan: _signed(f, a, b, n)
                        )
                    )
    return cases


def _signed(choose, a: exact.Number, b: exact.Number, nan: bool) -> exact.Number:
    """The chosen magnitude with the product of both signs."""
    chosen = choose(abs(a), abs(b), nan=nan)
    return -chosen if exact.is_negative(a) != exact.is_negative(b) else chosen


def _signs() -> list[Case]:
    cases = []
    for t in ("f32", "f64", *HALF_TYPES):
        for ftz in ("", ".ftz") if t in ("f32", "f16", "f16x2") else ("",):
            cases.append(numbers(f"abs{ftz}.{t}", t, t, abs))
            cases.append(numbers(f"neg{ftz}.{t}", t, t, exact.negate))
    for t in ("f32", "f64"):
        sign = 1 << (WIDTHS[t] - 1)
        cases.append(Case(f"copysign.{t}", (t, t), (t,), lambda a, b, s=sign: (b & (s - 1)) | (a & s)))
        cases.append(Case(f"mov.{t}", (t,), (t,), lambda a: a))
    return cases


def _classes() -> list[Case]:
    def test(name: str, kind: str, pattern: int) -> int:
        form = FORMATS[kind]
        magnitude = pattern & (form.sign - 1)
        subnormal = 0 < magnitude < 1 << form.mantissa
        finite = magnitude < form.infinity
        return int(
            {
                "finite": finite,
                "infinite": magnitude == form.infinity,
                "number": magnitude <= form.infinity,
                "notanumber": magnitude > form.infinity,
                "normal": finite and not subnormal,  # zeros count as normal
                "subnormal": subnormal,
            }[name]
        )

    names = ("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    return [
        Case(f"testp.{name}.{t}", (t,), ("pred",), lambda a, n=name, t=t: test(n, t, a))
        for name in names
        for t in ("f32", "f64")
    ]


CASES = _arithmetic() + _extremes() + _signs() + _classes()
