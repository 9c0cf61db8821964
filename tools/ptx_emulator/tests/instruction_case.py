"""One instruction, its operand types, and what it has to compute, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from edge_values import HALVES, WIDTHS
from number_formats import FORMATS, Number, decode, encode, flush, saturate


@dataclass(frozen=True)
class Case:
    """``expected`` takes the bit patterns of the operands and returns that of the result, or a tuple of them."""

    instruction: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    expected: Callable[..., int | tuple[int, ...]]
    template: str = ""
    note: str = ""

    @property
    def text(self) -> str:
        if self.template:
            return self.template
        destinations = "|".join(["{d}", "{d2}"][: len(self.outputs)])
        sources = ", ".join(["{a}", "{b}", "{c}", "{e}"][: len(self.inputs)])
        return f"{self.instruction} {destinations}, {sources};"

    @property
    def identifier(self) -> str:
        return self.instruction + (f"[{self.note}]" if self.note else "")

    @property
    def kernel(self) -> str:
        return "k_" + re.sub(r"\W", "_", self.identifier)


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def integer(value: int, kind: str) -> int:
    """The integer that a bit pattern stands for as an operand of type ``kind``."""
    bits = 24 if kind.endswith("24") else WIDTHS[kind]
    value &= (1 << bits) - 1
    return signed(value, bits) if kind[0] == "s" and kind != "shift" else value


def integers(
    instruction: str,
    inputs: str,
    output: str,
    function: Callable[..., int],
    *,
    template: str = "",
    note: str = "",
) -> Case:
    """A case whose result is ``function`` of the operands as integers, cut to the width of ``output``."""
    kinds = tuple(inputs.split())
    mask = (1 << WIDTHS[output]) - 1

    def expected(*operands: int) -> int:
        return function(*(integer(v, k) for v, k in zip(operands, kinds, strict=True))) & mask

    return Case(instruction, kinds, (output,), expected, template, note)


def numbers(
    instruction: str,
    inputs: str,
    output: str,
    function: Callable[..., Number],
    *,
    rounding: str = "rn",
    template: str = "",
    note: str = "",
) -> Case:
    """A case whose result is the exact ``function`` of the operands, rounded once, then as the modifiers say."""
    kinds = tuple(inputs.split())
    modifiers = instruction.split(".")
    flushing = "ftz" in modifiers
    flushed = ("f32",) if modifiers[0] == "cvt" else ("f32", "f16")
    single = HALVES.get(output, output)

    def one(*operands: int) -> int:
        exact = []
        for pattern, kind in zip(operands, kinds, strict=True):
            kind = HALVES.get(kind, kind)
            if kind not in FORMATS:
                exact.append(pattern)
                continue
            exact.append(decode(kind, flush(kind, pattern) if flushing and kind in flushed else pattern))
        value = function(*exact)
        if "sat" in modifiers:
            value = saturate(value)
        pattern = encode(single, value, rounding)
        if "relu" in modifiers and pattern >> (WIDTHS[single] - 1) and decode(single, pattern) <= 0:
            pattern = 0
        return flush(single, pattern) if flushing and single in flushed else pattern

    def both(*operands: int) -> int:
        low = one(*(v & 0xFFFF for v in operands))
        high = one(*(v >> 16 for v in operands))
        return low | high << 16

    return Case(instruction, kinds, (output,), both if output in HALVES else one, template, note)
