"""Comparisons and choices: every relation, ordered and not, alone and joined with a predicate."""

from __future__ import annotations

import math
import operator

from edge_values import HALVES
from instruction_case import Case, integer
from number_formats import decode, flush

ORDERED = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
UNORDERED = {f"{name}u": function for name, function in ORDERED.items()}
JOINS = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
FLOATS = ("f16", "bf16", "f32", "f64")


def relations(kind: str) -> list[str]:
    if kind in FLOATS or kind in HALVES:
        return [*ORDERED, *UNORDERED, "num", "nan"]
    if kind[0] == "b":
        return ["eq", "ne"]
    return [*ORDERED, *UNSIGNED] if kind[0] == "u" else [*ORDERED]


def compare(relation: str, kind: str, a: int, b: int, *, flushing: bool = False) -> bool:
    if kind in FLOATS:
        x, y = (decode(kind, flush(kind, v) if flushing else v) for v in (a, b))
        unordered = any(isinstance(v, float) and math.isnan(v) for v in (x, y))
        if relation in ("num", "nan"):
            return unordered == (relation == "nan")
        if unordered:
            return relation in UNORDERED
        return (ORDERED | UNORDERED)[relation](x, y)
    return (ORDERED | UNSIGNED)[relation](integer(a, kind), integer(b, kind))


def _setp() -> list[Case]:
    cases = []
    integers = [f"{sign}{bits}" for bits in (16, 32, 64) for sign in "bus"]
    for kind in (*integers, *FLOATS):
        for relation in relations(kind):
            for ftz in ("", ".ftz") if kind in ("f32", "f16") else ("",):
                cases.append(
                    Case(
                        f"setp.{relation}{ftz}.{kind}",
                        (kind, kind),
                        ("pred",),
                        lambda a, b, r=relation, k=kind, f=bool(ftz): int(compare(r, k, a, b, flushing=f)),
                    )
                )
    for kind in ("s32", "f32", "u64", "f64"):
        for name, join in JOINS.items():

            def joined(a: int, b: int, c: int, kind=kind, join=join) -> tuple[int, int]:
                found = int(compare("lt", kind, a, b))
                return join(found, c), join(1 - found, c)

            def inverted(a: int, b: int, c: int, joined=joined) -> tuple[int, int]:
                return joined(a, b, 1 - c)

            form = (kind, kind, "pred")
            cases.append(Case(f"setp.lt.{name}.{kind}", form, ("pred", "pred"), joined))
            text = f"setp.lt.{name}.{kind} {{d}}|{{d2}}, {{a}}, {{b}}, !{{c}};"
            cases.append(Case(f"setp.lt.{name}.{kind}", form, ("pred", "pred"), inverted, text, "inverted"))
    for kind, half in HALVES.items():
        for relation in ("eq", "lt", "geu", "nan"):

            def halves(a: int, b: int, half=half, relation=relation) -> tuple[int, ...]:
                return tuple(int(compare(relation, half, a >> s & 0xFFFF, b >> s & 0xFFFF)) for s in (0, 16))

            cases.append(Case(f"setp.{relation}.{kind}", (kind, kind), ("pred", "pred"), halves))
    return cases


TRUE = {
    "u16": 0xFFFF,
    "s16": 0xFFFF,
    "u32": 0xFFFFFFFF,
    "s32": 0xFFFFFFFF,
    "f32": 0x3F800000,
    "f16": 0x3C00,
    "bf16": 0x3F80,
}


def _set() -> list[Case]:
    cases = []
    pairs = [(t, s) for t in ("u32", "s32", "f32") for s in ("b32", "u16", "s32", "u64", "s64", "f16", "f32", "f64")]
    pairs.remove(("f32", "f16"))
    for target, source in (
        *pairs,
        ("f16", "f16"),
        ("bf16", "bf16"),
        ("u32", "bf16"),
        ("f16", "f32"),
        ("u16", "f16"),
        ("s16", "f16"),
        ("u16", "bf16"),
    ):
        for relation in ("eq", "ne") if source[0] == "b" and source != "bf16" else ("lt", "ge"):
            cases.append(
                Case(
                    f"set.{relation}.{target}.{source}",
                    (source, source),
                    (target,),
                    lambda a, b, r=relation, k=source, v=TRUE[target]: v * compare(r, k, a, b),
                )
            )
    cases.append(
        Case(
            "set.lt.and.u32.f32",
            ("f32", "f32", "pred"),
            ("u32",),
            lambda a, b, c: 0xFFFFFFFF * (compare("lt", "f32", a, b) and c),
        )
    )
    cases.append(
        Case(
            "set.gtu.ftz.u32.f32",
            ("f32", "f32"),
            ("u32",),
            lambda a, b: 0xFFFFFFFF * compare("gtu", "f32", a, b, flushing=True),
        )
    )
    for kind, half in HALVES.items():
        for relation in ("eq", "leu"):

            def halves(a: int, b: int, half=half, relation=relation) -> int:
                found = [compare(relation, half, a >> s & 0xFFFF, b >> s & 0xFFFF) for s in (0, 16)]
                return TRUE[half] * found[0] | TRUE[half] * found[1] << 16

            cases.append(Case(f"set.{relation}.{kind}.{kind}", (kind, kind), (kind,), halves))
    return cases


def _choices() -> list[Case]:
    cases = []
    kinds = [f"{sign}{bits}" for bits in (16, 32, 64) for sign in "bus"] + ["f32", "f64"]
    for kind in kinds:
        form = (kind, kind, "pred")
        cases.append(Case(f"selp.{kind}", form, (kind,), lambda a, b, c: a if c else b))
        cases.append(
            Case(
                f"slct.{kind}.s32",
                (kind, kind, "s32"),
                (kind,),
                lambda a, b, c: a if integer(c, "s32") >= 0 else b,
            )
        )
        for ftz in ("", ".ftz"):

            def choose(a: int, b: int, c: int, ftz=ftz) -> int:
                return a if compare("ge", "f32", c, 0, flushing=bool(ftz)) else b

            cases.append(Case(f"slct{ftz}.{kind}.f32", (kind, kind, "f32"), (kind,), choose))
    return cases


CASES = _setp() + _set() + _choices()
