"""Integer arithmetic and logic, after the PTX ISA's definitions."""

from __future__ import annotations

from instruction_case import Case, integers, signed

SIZES = (16, 32, 64)
TYPES = tuple(f"{sign}{bits}" for bits in SIZES for sign in "us")


def width(kind: str) -> int:
    return int(kind[1:])


def quotient(a: int, b: int, bits: int) -> int:
    """Truncated. A quotient by zero has all bits set, as GPUs do it."""
    return (abs(a) // abs(b)) * (-1 if (a < 0) != (b < 0) else 1) if b else (1 << bits) - 1


def remainder(a: int, b: int) -> int:
    """With the sign of the dividend, which it equals where the divisor is zero."""
    return abs(a) % abs(b) * (-1 if a < 0 else 1) if b else a


def clamp(value: int, kind: str) -> int:
    bits = width(kind)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
    return min(max(value, low), high)


def shift_right(a: int, amount: int, bits: int) -> int:
    return a >> min(amount, bits)


def find_msb(a: int, kind: str, *, as_shift: bool = False) -> int:
    a = ~a if a < 0 else a
    found = a.bit_length() - 1
    return width(kind) - 1 - found if as_shift and found >= 0 else found


def extract(a: int, position: int, length: int, kind: str) -> int:
    bits, position, length = width(kind), position & 255, length & 255
    pattern = a & ((1 << bits) - 1)
    sign = 0 if kind[0] == "u" or length == 0 else pattern >> min(position + length - 1, bits - 1) & 1
    result = 0
    for i in range(bits):
        inside = i < length and position + i < bits
        result |= (pattern >> (position + i) & 1 if inside else sign) << i
    return result


def insert(a: int, b: int, position: int, length: int, bits: int) -> int:
    position, length = position & 255, length & 255
    for i in range(length):
        if position + i < bits:
            b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
    return b


def permute(a: int, b: int, selector: int) -> int:
    """The generic mode: each nibble of the selector picks a byte, or repeats its sign."""
    both, result = a | b << 32, 0
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = both >> (8 * (nibble & 7)) & 255
        result |= (255 * (byte >> 7) if nibble & 8 else byte) << (8 * i)
    return result


PERMUTE_MODES = {  # bytes chosen for selectors 0 to 3, the highest byte first
    "f4e": ((3, 2, 1, 0), (4, 3, 2, 1), (5, 4, 3, 2), (6, 5, 4, 3)),
    "b4e": ((5, 6, 7, 0), (6, 7, 0, 1), (7, 0, 1, 2), (0, 1, 2, 3)),
    "rc8": ((0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)),
    "ecl": ((3, 2, 1, 0), (3, 2, 1, 1), (3, 2, 2, 2), (3, 3, 3, 3)),
    "ecr": ((0, 0, 0, 0), (1, 1, 1, 0), (2, 2, 1, 0), (3, 2, 1, 0)),
    "rc16": ((1, 0, 1, 0), (3, 2, 3, 2), (1, 0, 1, 0), (3, 2, 3, 2)),
}


def permute_mode(mode: str):
    def function(a: int, b: int, selector: int) -> int:
        both, result = a | b << 32, 0
        for byte in PERMUTE_MODES[mode][selector & 3]:
            result = result << 8 | (both >> (8 * byte) & 255)
        return result

    return function


def logic3(table: int):
    def function(a: int, b: int, c: int) -> int:
        result = 0
        for bit in range(32):
            row = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | c >> bit & 1
            result |= (table >> row & 1) << bit
        return result

    return function


def funnel(left: bool, wrap: bool):
    def function(low: int, high: int, amount: int) -> int:
        amount = amount & 31 if wrap else min(amount, 32)
        both = low | high << 32
        return both << amount >> 32 if left else both >> amount

    return function


def mask(position: int, length: int, wrap: bool) -> int:
    position, length = (position & 31, length & 31) if wrap else (min(position, 32), min(length, 32))
    return ((1 << length) - 1) << position


def extend(a: int, length: int, kind: str, wrap: bool) -> int:
    length = length & 31 if wrap else min(length, 32)
    part = a & ((1 << length) - 1)
    return signed(part, length) if kind == "s32" and length else part


def dot(a: int, b: int, c: int, kinds: tuple[str, str], parts: int, size: tuple[int, int], start: int = 0) -> int:
    for i in range(parts):
        x = a >> (size[0] * i) & ((1 << size[0]) - 1)
        y = b >> (size[1] * (i + start)) & ((1 << size[1]) - 1)
        c += (signed(x, size[0]) if kinds[0] == "s32" else x) * (signed(y, size[1]) if kinds[1] == "s32" else y)
    return c


def _arithmetic() -> list[Case]:
    cases = []
    for t in TYPES:
        bits, two, three = width(t), f"{t} {t}", f"{t} {t} {t}"
        cases += [
            integers(f"add.{t}", two, t, lambda a, b: a + b),
            integers(f"sub.{t}", two, t, lambda a, b: a - b),
            integers(f"mul.lo.{t}", two, t, lambda a, b: a * b),
            integers(f"mul.hi.{t}", two, t, lambda a, b, n=bits: a * b >> n),
            integers(f"mad.lo.{t}", three, t, lambda a, b, c: a * b + c),
            integers(f"mad.hi.{t}", three, t, lambda a, b, c, n=bits: (a * b >> n) + c),
            integers(f"sad.{t}", three, t, lambda a, b, c: c + abs(a - b)),
            integers(f"div.{t}", two, t, lambda a, b, n=bits: quotient(a, b, n)),
            integers(f"rem.{t}", two, t, remainder),
            integers(f"min.{t}", two, t, min),
            integers(f"max.{t}", two, t, max),
            integers(f"shr.{t}", f"{t} shift", t, lambda a, n, bits=bits: shift_right(a, n, bits)),
        ]
        if bits < 64:
            wide = f"{t[0]}{2 * bits}"
            cases.append(integers(f"mul.wide.{t}", two, wide, lambda a, b: a * b))
            cases.append(integers(f"mad.wide.{t}", f"{two} {wide}", wide, lambda a, b, c: a * b + c))
        cases.append(integers(f"mov.{t}", t, t, lambda a: a))
        if t[0] == "s":
            cases.append(integers(f"abs.{t}", t, t, abs))
            cases.append(integers(f"neg.{t}", t, t, lambda a: -a))
    cases.append(integers("add.sat.s32", "s32 s32", "s32", lambda a, b: clamp(a + b, "s32")))
    cases.append(integers("sub.sat.s32", "s32 s32", "s32", lambda a, b: clamp(a - b, "s32")))
    cases.append(
        integers("mad.hi.sat.s32", "s32 s32 s32", "s32", lambda a, b, c: clamp((a * b >> 32) + c, "s32")),
    )
    for t in ("u", "s"):
        pair, word = f"{t}24 {t}24", f"{t}32"
        cases += [
            integers(f"mul24.lo.{word}", pair, word, lambda a, b: a * b),
            integers(f"mul24.hi.{word}", pair, word, lambda a, b: a * b >> 16),
            integers(f"mad24.lo.{word}", f"{pair} {word}", word, lambda a, b, c: a * b + c),
            integers(f"mad24.hi.{word}", f"{pair} {word}", word, lambda a, b, c: (a * b >> 16) + c),
        ]
    return cases


def _carries() -> list[Case]:
    cases = []
    for n in (32, 64):
        word = f"u{n}"
        low = (1 << n) - 1

        def joined(function, n=n, low=low):
            def expected(a: int, b: int, c: int, e: int) -> tuple[int, int]:
                total = function(a | b << n, c | e << n)
                return total & low, total >> n & low

            return expected

        def split(first: str, second: str, function, *, joined=joined, word=word) -> Case:
            text = f"{first} {{d}}, {{a}}, {{c}}; {second} {{d2}}, {{b}}, {{e}};"
            return Case(first, (word,) * 4, (word, word), joined(function), text)

        cases.append(split(f"add.cc.{word}", f"addc.{word}", lambda x, y: x + y))
        cases.append(split(f"sub.cc.{word}", f"subc.{word}", lambda x, y: x - y))

        def wide(a: int, b: int, c: int, e: int, n=n, low=low) -> tuple[int, int]:
            total = a * b + (c | e << n)
            return total & low, total >> n & low

        text = f"mad.lo.cc.{word} {{d}}, {{a}}, {{b}}, {{c}}; madc.hi.{word} {{d2}}, {{a}}, {{b}}, {{e}};"
        cases.append(Case(f"mad.lo.cc.{word}", (word,) * 4, (word, word), wide, text))
    return cases


def _logic() -> list[Case]:
    cases = []
    for n in SIZES:
        t, two = f"b{n}", f"b{n} b{n}"
        cases += [
            integers(f"and.{t}", two, t, lambda a, b: a & b),
            integers(f"or.{t}", two, t, lambda a, b: a | b),
            integers(f"xor.{t}", two, t, lambda a, b: a ^ b),
            integers(f"not.{t}", t, t, lambda a: ~a),
            integers(f"cnot.{t}", t, t, lambda a: int(a == 0)),
            integers(f"shl.{t}", f"{t} shift", t, lambda a, s, n=n: a << min(s, n)),
            integers(f"shr.{t}", f"{t} shift", t, lambda a, s: a >> min(s, 64)),
            integers(f"mov.{t}", t, t, lambda a: a),
        ]
    cases += [
        integers("and.pred", "pred pred", "pred", lambda a, b: a & b),
        integers("or.pred", "pred pred", "pred", lambda a, b: a | b),
        integers("xor.pred", "pred pred", "pred", lambda a, b: a ^ b),
        integers("not.pred", "pred", "pred", lambda a: 1 - a),
        integers("mov.pred", "pred", "pred", lambda a: a),
    ]
    for table in (0, 1, 0x3A, 0x80, 0x96, 0xCA, 0xE8, 0xFE, 0xFF, 0x1B):
        text = f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};"
        cases.append(integers("lop3.b32", "b32 b32 b32", "b32", logic3(table), template=text, note=hex(table)))
    for side in "lr":
        for mode in ("wrap", "clamp"):
            name = f"shf.{side}.{mode}.b32"
            cases.append(integers(name, "b32 b32 shift", "b32", funnel(side == "l", mode == "wrap")))
    return cases


def _bits() -> list[Case]:
    cases = []
    for n in (32, 64):
        t = f"b{n}"
        cases += [
            integers(f"popc.{t}", t, "u32", lambda a: a.bit_count()),
            integers(f"clz.{t}", t, "u32", lambda a, n=n: n - a.bit_length()),
            integers(f"brev.{t}", t, t, lambda a, n=n: int(f"{a:0{n}b}"[::-1], 2)),
            integers(f"bfi.{t}", f"{t} {t} byte byte", t, lambda a, b, c, e, n=n: insert(a, b, c, e, n)),
        ]
        for kind in (f"u{n}", f"s{n}"):
            cases += [
                integers(f"bfe.{kind}", f"{kind} byte byte", kind, lambda a, b, c, k=kind: extract(a, b, c, k)),
                integers(f"bfind.{kind}", kind, "u32", lambda a, k=kind: find_msb(a, k)),
                integers(f"bfind.shiftamt.{kind}", kind, "u32", lambda a, k=kind: find_msb(a, k, as_shift=True)),
            ]
    cases.append(integers("prmt.b32", "b32 b32 b32", "b32", permute))
    for mode in PERMUTE_MODES:
        cases.append(integers(f"prmt.b32.{mode}", "b32 b32 b32", "b32", permute_mode(mode)))
    for mode in ("wrap", "clamp"):
        wrap = mode == "wrap"
        cases.append(integers(f"bmsk.{mode}.b32", "shift shift", "b32", lambda a, b, w=wrap: mask(a, b, w)))
        for kind in ("u32", "s32"):
            name = f"szext.{mode}.{kind}"
            cases.append(integers(name, f"{kind} shift", kind, lambda a, b, k=kind, w=wrap: extend(a, b, k, w)))
    for x in ("u32", "s32"):
        for y in ("u32", "s32"):
            total = "u32" if (x, y) == ("u32", "u32") else "s32"
            kinds = (x, y)
            cases.append(
                integers(
                    f"dp4a.{x}.{y}", f"b32 b32 {total}", total, lambda a, b, c, k=kinds: dot(a, b, c, k, 4, (8, 8))
                )
            )
            for half, start in (("lo", 0), ("hi", 2)):
                cases.append(
                    integers(
                        f"dp2a.{half}.{x}.{y}",
                        f"b32 b32 {total}",
                        total,
                        lambda a, b, c, k=kinds, s=start: dot(a, b, c, k, 2, (16, 8), s),
                    )
                )
    return cases


def _moves() -> list[Case]:
    return [
        Case("mov.b32", ("b16", "b16"), ("b32",), lambda a, b: a | b << 16, "mov.b32 {d}, {{{a}, {b}}};", "pack"),
        Case("mov.b64", ("b32", "b32"), ("b64",), lambda a, b: a | b << 32, "mov.b64 {d}, {{{a}, {b}}};", "pack"),
        Case(
            "mov.b64",
            ("b16",) * 4,
            ("b64",),
            lambda a, b, c, e: a | b << 16 | c << 32 | e << 48,
            "mov.b64 {d}, {{{a}, {b}, {c}, {e}}};",
            "pack four",
        ),
        Case(
            "mov.b32",
            ("b32",),
            ("b16", "b16"),
            lambda a: (a & 0xFFFF, a >> 16),
            "mov.b32 {{{d}, {d2}}}, {a};",
            "unpack",
        ),
        Case(
            "mov.b64",
            ("b64",),
            ("b32", "b32"),
            lambda a: (a & 0xFFFFFFFF, a >> 32),
            "mov.b64 {{{d}, {d2}}}, {a};",
            "unpack",
        ),
        Case("mov.b64", ("b64",), ("b32",), lambda a: a >> 32, "mov.b64 {{_, {d}}}, {a};", "sink"),
    ]


CASES = _arithmetic() + _carries() + _logic() + _bits() + _moves()
