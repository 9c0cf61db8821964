"""Matrix instructions of one warp: ldmatrix, stmatrix, and mma.sync in every shape and type."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from matrix_fragments import BITS, Shape, accumulator, multiplicand_a, multiplicand_b, pack, unpack
from ptx_emulator import Emulator, EmulatorError
from ptx_text import entry, module
from tolerances import assert_close

FORMS = [  # shape, types of D, A, B, C
    *[(Shape(16, 8, k), d, t, t, d) for k in (8, 16) for t, d in (("f16", "f16"), ("f16", "f32"), ("bf16", "f32"))],
    *[(Shape(16, 8, k), "f32", "tf32", "tf32", "f32") for k in (4, 8)],
    *[(Shape(16, 8, k), "s32", a, b, "s32") for k in (16, 32) for a in ("s8", "u8") for b in ("s8", "u8")],
]


def instruction(shape: Shape, d: str, a: str, b: str, c: str) -> str:
    return f"mma.sync.aligned.{shape}.row.col.{d}.{a}.{b}.{c}"


def registers_of(kind: str) -> tuple[str, str]:
    """Prefix and type of the registers."""
    return ("%x", "b64") if BITS[kind] == 64 else ("%r", "b32")


def multiply(form: tuple, a: np.ndarray, b: np.ndarray, c: np.ndarray, *, stored_as: str = "") -> np.ndarray:
    """What the emulator makes of a b + c; A and B are written into registers as ``stored_as``."""
    shape, kind_d, kind_a, kind_b, kind_c = form
    places = [multiplicand_a(shape, kind_a), multiplicand_b(shape, kind_b), accumulator(shape, kind_c)]
    stored = (stored_as or kind_a, stored_as or kind_b, kind_c)
    packed = [pack(m, p, k) for m, p, k in zip((a, b, c), places, stored, strict=True)]
    lines = ["mov.u32 %r63, %tid.x;"]
    lists, first = [], 0
    for n, words in enumerate(packed):
        prefix, kind = registers_of((kind_a, kind_b, kind_c)[n])
        count = words.shape[1]
        names = [f"{prefix}{first + i}" for i in range(count)]
        lines.append(f"ld.param.u64 %x60, [m{n}]; mad.wide.u32 %x60, %r63, {words.itemsize * count}, %x60;")
        lines += [f"ld.global.{kind} {name}, [%x60+{words.itemsize * i}];" for i, name in enumerate(names)]
        lists.append("{" + ", ".join(names) + "}")
        first += count
    result = np.zeros_like(packed[2])
    prefix, kind = registers_of(kind_d)
    names = [f"{prefix}{first + i}" for i in range(result.shape[1])]
    name = instruction(*form)
    lines.append(f"{name} {{{', '.join(names)}}}, {', '.join(lists)};")
    lines.append(f"ld.param.u64 %x60, [d]; mad.wide.u32 %x60, %r63, {result.itemsize * len(names)}, %x60;")
    lines += [f"st.global.{kind} [%x60+{result.itemsize * i}], {name};" for i, name in enumerate(names)]
    ptx = module(entry("kernel", ["u64 m0", "u64 m1", "u64 m2", "u64 d"], "\n".join(lines)))
    launch = Emulator(90).launch(ptx, "kernel", 1, 32, [*packed, result])
    assert launch.opcodes[name] == 1
    assert launch.statistics.matrix_instructions == 1
    assert launch.statistics.matrix_macs == shape.m * shape.n * shape.k
    return unpack(result, accumulator(shape, kind_d), kind_d)


def operands(form: tuple, *, seed: int = 0, whole: bool = True) -> list[np.ndarray]:
    """Matrices that their types hold exactly; small whole numbers, or fractions."""
    shape, _, kind_a, kind_b, kind_c = form
    generator = np.random.default_rng(seed)
    matrices = []
    for rows, columns, kind in ((shape.m, shape.k, kind_a), (shape.k, shape.n, kind_b), (shape.m, shape.n, kind_c)):
        if kind in ("s8", "u8", "s32"):
            low, high = {"s8": (-128, 128), "u8": (0, 256), "s32": (-1000, 1000)}[kind]
            matrices.append(generator.integers(low, high, (rows, columns)).astype(float))
        elif whole:
            matrices.append(generator.integers(-8, 9, (rows, columns)).astype(float))
        else:
            dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.bfloat16, "f32": torch.float32}
            values = torch.from_numpy(generator.standard_normal((rows, columns)))
            matrices.append(values.to(dtype.get(kind, torch.float64)).double().numpy())
    return matrices


@pytest.mark.parametrize("form", FORMS, ids=lambda form: instruction(*form)[17:])
def test_whole_numbers_multiply_exactly(form: tuple):
    """Every element in its place: sums of small whole numbers have no rounding in any of the types."""
    a, b, c = operands(form)
    np.testing.assert_array_equal(multiply(form, a, b, c), a @ b + c)


@pytest.mark.parametrize("form", [f for f in FORMS if "s32" not in f], ids=lambda form: instruction(*form)[17:])
def test_fractions_multiply_to_a_few_roundings(form: tuple):
    a, b, c = operands(form, whole=False)
    dtype = {"f16": torch.float16, "f32": torch.float32, "f64": torch.float64}[form[1]]
    actual = torch.from_numpy(multiply(form, a, b, c)).to(dtype)
    assert_close(actual, torch.from_numpy(a @ b + c), name=instruction(*form))


def test_tf32_ignores_the_lower_13_bits_of_its_operands():
    form = (Shape(16, 8, 8), "f32", "tf32", "tf32", "f32")
    a, b, c = operands(form)
    noisy = a * (1 + 2.0**-12)  # float32 holds it, tf32 does not
    np.testing.assert_array_equal(multiply(form, noisy, b * (1 + 2.0**-12), c, stored_as="f32"), a @ b + c)


def test_integer_accumulator_wraps():
    form = (Shape(16, 8, 16), "s32", "s8", "s8", "s32")
    a, b = np.full((16, 16), 127.0), np.full((16, 8), 127.0)
    b[:, 4:] = -128
    c = np.where(np.arange(8) < 4, 2.0**31 - 1, -(2.0**31)) * np.ones((16, 1))
    expected = (a @ b + c + 2.0**31) % 2.0**32 - 2.0**31
    np.testing.assert_array_equal(multiply(form, a, b, c), expected)


def test_infinity_and_nan_reach_only_their_rows():
    form = (Shape(16, 8, 16), "f32", "f16", "f16", "f32")
    a, b, c = operands(form)
    b = np.abs(b) + 1
    a[3, 5], a[9, 0] = np.inf, np.nan
    found = multiply(form, a, b, c)
    assert np.isposinf(found[3]).all()
    assert np.isnan(found[9]).all()
    rest = [row for row in range(16) if row not in (3, 9)]
    np.testing.assert_array_equal(found[rest], (a @ b + c)[rest])


def matrix_words(count: int) -> np.ndarray:
    """``count`` matrices of 8 by 8 elements of 16 bits, all different."""
    return (np.arange(64 * count, dtype=np.uint16) * 3 + 1).reshape(count, 8, 8)


@pytest.mark.parametrize("transposed", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("space", [".shared", ".shared::cta", ""])
def test_ldmatrix(count: int, transposed: str, space: str):
    names = ", ".join(f"%r{8 + i}" for i in range(count))
    name = f"ldmatrix.sync.aligned.m8n8.x{count}{transposed}{space}.b16"
    body = f"""
        ld.param.u64 %x0, [source]; ld.param.u64 %x1, [target]; mov.u32 %r0, %tid.x; mov.u64 %x4, pool;
        mul.wide.u32 %x2, %r0, 16; add.u64 %x0, %x0, %x2; add.u64 %x4, %x4, %x2;
        ld.global.v2.b64 {{%x5, %x6}}, [%x0]; st.shared.v2.b64 [%x4], {{%x5, %x6}};
        bar.warp.sync 0xFFFFFFFF;
        {"cvta.shared.u64 %x4, %x4;" if not space else ""}
        {name} {{{names}}}, [%x4];
        mul.wide.u32 %x2, %r0, {4 * count}; add.u64 %x1, %x1, %x2;
        {"".join(f"st.global.b32 [%x1+{4 * i}], %r{8 + i};" for i in range(count))}
    """
    room = np.zeros(528, np.uint8)
    source = room[-room.ctypes.data % 16 :][:512].view(np.uint16).reshape(4, 8, 8)
    source[:] = matrix_words(4)
    target = np.zeros((32, count, 2), np.uint16)
    ptx = module(entry("kernel", ["u64 source", "u64 target"], body, registers=".shared .align 16 .b8 pool[512];"))
    launch = Emulator(90).launch(ptx, "kernel", 1, 32, [source, target])
    assert launch.opcodes[name] == 1
    expected = source.transpose(0, 2, 1) if transposed else source
    lane = np.arange(32)
    for i in range(count):
        for half in range(2):
            np.testing.assert_array_equal(target[:, i, half], expected[i, lane // 4, lane % 4 * 2 + half])


@pytest.mark.parametrize("transposed", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count: int, transposed: str):
    names = ", ".join(f"%r{8 + i}" for i in range(count))
    name = f"stmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16"
    body = f"""
        ld.param.u64 %x0, [source]; ld.param.u64 %x1, [target]; mov.u32 %r0, %tid.x; mov.u64 %x4, pool;
        mul.wide.u32 %x2, %r0, {4 * count}; add.u64 %x0, %x0, %x2;
        {"".join(f"ld.global.b32 %r{8 + i}, [%x0+{4 * i}];" for i in range(count))}
        mul.wide.u32 %x2, %r0, 16; add.u64 %x4, %x4, %x2; add.u64 %x1, %x1, %x2;
        {name} [%x4], {{{names}}};
        bar.warp.sync 0xFFFFFFFF;
        setp.ge.u32 %p0, %r0, {8 * count}; @%p0 ret;
        ld.shared.v2.b64 {{%x5, %x6}}, [%x4]; st.global.v2.b64 [%x1], {{%x5, %x6}};
    """
    source = np.zeros((32, count, 2), np.uint16)
    matrices = matrix_words(count)
    lane = np.arange(32)
    for i in range(count):
        for half in range(2):
            row, column = lane // 4, lane % 4 * 2 + half
            source[:, i, half] = matrices[i, column, row] if transposed else matrices[i, row, column]
    room = np.zeros(528, np.uint8)
    target = room[-room.ctypes.data % 16 :][: 128 * count].view(np.uint16).reshape(count, 8, 8)
    ptx = module(entry("kernel", ["u64 source", "u64 target"], body, registers=".shared .align 16 .b8 pool[512];"))
    Emulator(90).launch(ptx, "kernel", 1, 32, [source, target])
    np.testing.assert_array_equal(target, matrices)


@pytest.mark.parametrize("same", [True, False])
def test_stmatrix_of_two_warps_to_one_place_is_a_race_unless_they_store_the_same(same: bool):
    body = f"""
        mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 7; mul.wide.u32 %x2, %r1, 16; mov.u64 %x4, pool; add.u64 %x4, %x4, %x2;
        {"mov.u32 %r2, 7;" if same else "shr.u32 %r2, %r0, 5;"}
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%x4], {{%r2}};
    """
    ptx = module(entry("kernel", [], body, registers=".shared .align 16 .b8 pool[128];"))
    with nullcontext() if same else pytest.raises(EmulatorError, match="shared_race"):
        Emulator(90).launch(ptx, "kernel", 1, 64, [])
