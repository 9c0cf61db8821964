"""wgmma: products of a warpgroup with operands in swizzled shared memory, without a compiler."""

from __future__ import annotations

import numpy as np
import pytest
from matrix_fragments import BITS, Shape, accumulator, multiplicand_a, pack, to_pattern, unpack
from ptx_emulator import Emulator
from ptx_text import entry, module

THREADS = 128
K = {"f16": 16, "bf16": 16, "tf32": 8}
SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}
"""Code in the descriptor, and the bytes of a row of the layout."""
REGION = 16384  # bytes of shared memory for each operand


def place(index: int, k: int, element: int, swizzle: int, *, leading: int, stride: int) -> int:
    """Byte offset of an element of a matrix that is contiguous along K, in the canonical layout."""
    row = SWIZZLES[swizzle]
    chunk, within = divmod(k * element, 16)
    offset = index % 8 * row + index // 8 * stride + chunk * (leading if swizzle == 0 else 16) + within
    return offset ^ (offset >> 3 & {0: 0, 1: 0x70, 2: 0x30, 3: 0x10}[swizzle])


def place_transposed(index: int, k: int, element: int, swizzle: int, *, leading: int, stride: int) -> int:
    """The same for a matrix that is contiguous along M or N."""
    row = SWIZZLES[swizzle]
    chunk, within = divmod(index, 16 // element)
    per_row = row // 16
    if swizzle == 0:
        offset = chunk * stride + k % 8 * 16 + k // 8 * leading + within * element
    else:
        offset = chunk % per_row * 16 + chunk // per_row * leading + k % 8 * row + k // 8 * stride + within * element
    return offset ^ (offset >> 3 & {0: 0, 1: 0x70, 2: 0x30, 3: 0x10}[swizzle])


def strides(size: int, k: int, element: int, swizzle: int, transposed: bool) -> tuple[int, int]:
    """Leading and stride byte offsets that pack the matrix without holes."""
    row = SWIZZLES[swizzle]
    if not transposed:
        return (8 * 16 * (size // 8), 128) if swizzle == 0 else (16, 8 * row)
    if swizzle == 0:
        return 128 * (size * element // 16), 128
    return 8 * row * (k // 8), 8 * row


def store(matrix: np.ndarray, kind: str, swizzle: int, transposed: bool) -> tuple[np.ndarray, int]:
    """A matrix ``[M or N, K]`` as bytes of shared memory, and its descriptor without the address."""
    element = BITS[kind] // 8
    leading, stride = strides(*matrix.shape, element, swizzle, transposed)
    image = np.zeros(REGION, np.uint8)
    for index in range(matrix.shape[0]):
        for k in range(matrix.shape[1]):
            where = (place_transposed if transposed else place)(
                index, k, element, swizzle, leading=leading, stride=stride
            )
            image[where : where + element] = np.frombuffer(
                to_pattern(kind, matrix[index, k]).to_bytes(element, "little"), np.uint8
            )
    return image, leading >> 4 << 16 | stride >> 4 << 32 | swizzle << 62


def product(
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray | None,
    *,
    kinds: tuple[str, str] = ("f32", "f16"),
    swizzle: int = 1,
    in_registers: bool = False,
    transposed: tuple[bool, bool] = (False, False),
    repeat: int = 1,
    schedule: str = "round_robin",
) -> np.ndarray:
    """a b + c by wgmma; ``a`` is 64 by k, ``b`` is n by k."""
    kind_d, kind = kinds
    shape = Shape(64, b.shape[0], a.shape[1])
    image_a, descriptor_a = store(a, kind, swizzle, transposed[0])
    image_b, descriptor_b = store(b, kind, swizzle, transposed[1])
    shared = np.concatenate([image_a, image_b])
    places = accumulator(shape, kind_d)
    registers = places.shape[1]
    start = np.zeros((4, 16, shape.n)) if c is None else c.reshape(4, 16, shape.n)
    sums = np.stack([pack(start[w], places, kind_d) for w in range(4)])
    a_words = np.stack(
        [pack(a[16 * w : 16 * w + 16], multiplicand_a(Shape(16, 8, shape.k), kind), kind) for w in range(4)]
    )
    names = ", ".join(f"%c{i}" for i in range(registers))
    name = f"wgmma.mma_async.sync.aligned.{shape}.{kind_d}.{kind}.{kind}"
    flags = ""
    if kind != "tf32":
        flags = f", {int(transposed[1])}" if in_registers else f", {int(transposed[0])}, {int(transposed[1])}"
    first = "{%r20, %r21, %r22, %r23}" if in_registers else "%x10"
    body = f"""
        ld.param.u64 %x0, [image]; ld.param.u64 %x1, [sums]; ld.param.u64 %x2, [words];
        mov.u32 %r0, %tid.x; mov.u32 %r1, pool;
        mad.wide.u32 %x1, %r0, {4 * registers}, %x1; mad.wide.u32 %x2, %r0, 16, %x2; mad.wide.u32 %x0, %r0, 16, %x0;
        mad.lo.u32 %r2, %r0, 16, %r1; mov.u32 %r3, 0;
    COPY:
        ld.global.v2.b64 {{%x5, %x6}}, [%x0]; st.shared.v2.b64 [%r2], {{%x5, %x6}};
        add.u64 %x0, %x0, {16 * THREADS}; add.u32 %r2, %r2, {16 * THREADS}; add.u32 %r3, %r3, {16 * THREADS};
        setp.lt.u32 %p0, %r3, {2 * REGION}; @%p0 bra COPY;
        {"".join(f"ld.global.b32 %c{i}, [%x1+{4 * i}];" for i in range(registers))}
        {"".join(f"ld.global.b32 %r{20 + i}, [%x2+{4 * i}];" for i in range(4))}
        fence.proxy.async.shared::cta; bar.sync 0;
        shr.u32 %r4, %r1, 4; and.b32 %r4, %r4, 0x3FFF; cvt.u64.u32 %x7, %r4; or.b64 %x10, %x7, {descriptor_a};
        add.u32 %r5, %r1, {REGION}; shr.u32 %r4, %r5, 4; and.b32 %r4, %r4, 0x3FFF; cvt.u64.u32 %x7, %r4;
        or.b64 %x11, %x7, {descriptor_b};
        setp.ne.b32 %p1, {0 if c is None else 1}, 0; setp.ne.b32 %p2, 1, 0;
        wgmma.fence.sync.aligned;
        {name} {{{names}}}, {first}, %x11, %p1, 1, 1{flags};
        {f"{name} {{{names}}}, {first}, %x11, %p2, 1, 1{flags};" * (repeat - 1)}
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        {"".join(f"st.global.b32 [%x1+{4 * i}], %c{i};" for i in range(registers))}
    """
    declared = f".reg .b32 %c<{registers}>; .shared .align 1024 .b8 pool[{2 * REGION}];"
    ptx = module(entry("kernel", ["u64 image", "u64 sums", "u64 words"], body, registers=declared))
    room = np.zeros(2 * REGION + 16, np.uint8)
    image = room[-room.ctypes.data % 16 :][: 2 * REGION]
    image[:] = shared
    launch = Emulator(90, schedule=schedule, seed=2).launch(ptx, "kernel", 1, THREADS, [image, sums, a_words])
    assert launch.opcodes[name] == 4 * repeat
    assert launch.statistics.matrix_macs == repeat * shape.m * shape.n * shape.k
    return np.concatenate([unpack(sums[w], places, kind_d) for w in range(4)])


def whole(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-6, 7, (rows, columns)).astype(float)


TYPES = [("f32", "f16"), ("f32", "bf16"), ("f32", "tf32"), ("f16", "f16")]


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("kinds", TYPES, ids=str)
@pytest.mark.parametrize("n", [8, 64, 120])
def test_product_of_whole_numbers_is_exact(kinds: tuple[str, str], n: int, swizzle: int):
    k = K[kinds[1]]
    a, b, c = whole(64, k, 0), whole(n, k, 1), whole(64, n, 2)
    np.testing.assert_array_equal(product(a, b, c, kinds=kinds, swizzle=swizzle), a @ b.T + c)


@pytest.mark.parametrize("kinds", TYPES, ids=str)
def test_first_operand_may_lie_in_registers(kinds: tuple[str, str]):
    k = K[kinds[1]]
    a, b, c = whole(64, k, 0), whole(32, k, 1), whole(64, 32, 2)
    np.testing.assert_array_equal(product(a, b, c, kinds=kinds, in_registers=True), a @ b.T + c)


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("transposed", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_operand_may_be_contiguous_along_its_rows(transposed: tuple[bool, bool], swizzle: int, kind: str):
    a, b, c = whole(64, 16, 0), whole(64, 16, 1), whole(64, 64, 2)
    found = product(a, b, c, kinds=("f32", kind), swizzle=swizzle, transposed=transposed)
    np.testing.assert_array_equal(found, a @ b.T + c)


@pytest.mark.parametrize("schedule", ["round_robin", "reversed", "random"])
def test_accumulator_is_ignored_on_request_and_products_add_up(schedule: str):
    a, b = whole(64, 16, 0), whole(16, 16, 1)
    np.testing.assert_array_equal(product(a, b, None, repeat=3, schedule=schedule), 3 * (a @ b.T))
