"""Loads and stores: every width, every vector, every state space, and addresses of every form."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from ptx_emulator import Buffer, Emulator
from ptx_text import entry, module

RNG = np.random.default_rng(0)
TYPES = {
    **{f"{kind}{bits}": bits // 8 for bits in (8, 16, 32, 64) for kind in "bus"},
    "f32": 4,
    "f64": 8,
}
REGISTERS = {1: "%h", 2: "%h", 4: "%r", 8: "%x"}
VECTORS = [(kind, lanes) for kind, size in TYPES.items() for lanes in (1, 2, 4) if size * lanes <= 16]
COPY_THROUGH = ("global", "shared", "local", "generic global", "generic shared", "generic local")
THREADS = 64


def operands(kind: str, lanes: int) -> tuple[str, str]:
    """The instruction's suffix, and its registers."""
    names = [f"{REGISTERS[TYPES[kind]]}{10 + n}" for n in range(lanes)]
    return (f".v{lanes}.{kind}", "{" + ", ".join(names) + "}") if lanes > 1 else (f".{kind}", names[0])


def launch(ptx: str, arguments: list, *, block: int = THREADS, grid: int = 1, **options):
    return Emulator(90).launch(ptx, "kernel", grid, block, arguments, **options)


@pytest.mark.parametrize("space", COPY_THROUGH)
@pytest.mark.parametrize(("kind", "lanes"), VECTORS, ids=str)
def test_value_survives_every_space_and_width(kind: str, lanes: int, space: str):
    suffix, registers = operands(kind, lanes)
    size = TYPES[kind] * lanes
    where = space.split()[-1]
    generic = space.startswith("generic")
    body = f"""
        ld.param.u64 %x0, [source]; ld.param.u64 %x1, [target]; ld.param.u64 %x2, [scratch];
        mov.u32 %r0, %tid.x; mul.wide.u32 %x3, %r0, {size};
        add.u64 %x4, %x0, %x3; add.u64 %x5, %x1, %x3;
        ld.global{suffix} {registers}, [%x4];
    """
    if where == "global":
        body += "add.u64 %x6, %x2, %x3;\n"
    elif where == "shared":
        body += "mov.u64 %x6, pool; add.u64 %x6, %x6, %x3;\n"
    else:
        body += "mov.u64 %x6, stack; add.u64 %x6, %x6, 16;\n"
    if generic:
        body += f"cvta.{where}.u64 %x6, %x6;\n"
    dotted = "" if generic else f".{where}"
    zeros = "".join(f"mov.b{max(8 * TYPES[kind], 16)} {name}, 0; " for name in registers.strip("{}").split(", "))
    body += f"""
        st{dotted}{suffix} [%x6], {registers};
        {zeros}
        ld{dotted}{suffix} {registers}, [%x6];
        st.global{suffix} [%x5], {registers};
    """
    pool = f".shared .align 16 .b8 pool[{16 * THREADS}]; .local .align 16 .b8 stack[48];"
    ptx = module(entry("kernel", ["u64 source", "u64 target", "u64 scratch"], body, registers=pool))
    source = RNG.integers(0, 256, THREADS * size, dtype=np.uint8)
    target, scratch = np.zeros_like(source), np.zeros_like(source)
    found = launch(ptx, [source, target, scratch])
    np.testing.assert_array_equal(target, source)
    assert found.opcodes[f"ld{dotted}{suffix}"]
    assert found.opcodes[f"st{dotted}{suffix}"]


@pytest.mark.parametrize("kind", ["u8", "s8", "b8", "u16", "s16", "b16", "u32", "s32"])
def test_narrow_load_extends_into_a_wide_register(kind: str):
    body = f"""
        ld.param.u64 %x0, [source]; ld.param.u64 %x1, [target];
        mov.u32 %r0, %tid.x; mul.wide.u32 %x2, %r0, {TYPES[kind]}; mul.wide.u32 %x3, %r0, 8;
        add.u64 %x0, %x0, %x2; add.u64 %x1, %x1, %x3;
        ld.global.{kind} %x4, [%x0];
        st.global.b64 [%x1], %x4;
    """
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{TYPES[kind]}")
    source = RNG.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, THREADS, dtype=dtype, endpoint=True)
    target = np.zeros(THREADS, np.int64)
    launch(module(entry("kernel", ["u64 source", "u64 target"], body)), [source, target])
    np.testing.assert_array_equal(target, source.astype(np.int64))


LOADS = [
    "ld.weak.global",
    "ld.volatile.global",
    "ld.relaxed.gpu.global",
    "ld.relaxed.sys.global",
    "ld.acquire.gpu.global",
]
LOADS += ["ld.global.ca", "ld.global.cg", "ld.global.cs", "ld.global.lu", "ld.global.cv", "ld.global.nc", "ldu.global"]
LOADS += ["ld.global.nc.L1::no_allocate", "ld.global.L1::evict_last", "ld.global.L2::128B", "ld.global.nc.L2::256B"]
STORES = [
    "st.weak.global",
    "st.volatile.global",
    "st.relaxed.gpu.global",
    "st.relaxed.cta.global",
    "st.release.gpu.global",
]
STORES += ["st.global.wb", "st.global.cg", "st.global.cs", "st.global.wt", "st.global.L1::evict_first"]
SHARED = [("ld.volatile.shared", "st.volatile.shared"), ("ld.shared::cta", "st.shared::cta")]
SHARED += [("ld.relaxed.cta.shared", "st.relaxed.cta.shared"), ("ld.acquire.cta.shared", "st.release.cta.shared")]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("store", STORES)
def test_cache_and_ordering_hints_do_not_change_the_value(load: str, store: str):
    body = f"""
        ld.param.u64 %x0, [source]; ld.param.u64 %x1, [target];
        {load}.b32 %r1, [%x0+4];
        {store}.b32 [%x1+8], %r1;
    """
    source, target = np.arange(4, dtype=np.int32) + 7, np.zeros(4, np.int32)
    found = launch(module(entry("kernel", ["u64 source", "u64 target"], body)), [source, target], block=1)
    assert target.tolist() == [0, 0, 8, 0]
    assert found.opcodes[f"{load}.b32"] == found.opcodes[f"{store}.b32"] == 1


@pytest.mark.parametrize(("load", "store"), SHARED)
def test_shared_access_with_ordering_hints(load: str, store: str):
    body = f"""
        ld.param.u64 %x1, [target];
        mov.u32 %r0, pool; mov.u32 %r1, 77;
        {store}.b32 [%r0+12], %r1;
        {load}.b32 %r2, [pool+12];
        st.global.b32 [%x1], %r2;
    """
    target = np.zeros(1, np.int32)
    text = entry("kernel", ["u64 target"], body, registers=".shared .align 4 .b8 pool[16];")
    launch(module(text), [target], block=1)
    assert target[0] == 77


def test_address_takes_positive_negative_and_no_offset():
    body = """
        ld.param.u64 %x0, [source]; ld.param.u64 %x1, [target];
        add.u64 %x2, %x0, 8;
        ld.global.b32 %r1, [%x2]; ld.global.b32 %r2, [%x2+4]; ld.global.b32 %r3, [%x2+-4]; ld.global.b32 %r4, [%x2+-8];
        st.global.v4.b32 [%x1], {%r1, %r2, %r3, %r4};
    """
    source, target = np.arange(4, dtype=np.int32), np.zeros(4, np.int32)
    launch(module(entry("kernel", ["u64 source", "u64 target"], body)), [source, target], block=1)
    assert target.tolist() == [2, 3, 1, 0]


def test_vector_load_and_store_skip_a_sink():
    body = """
        ld.param.u64 %x0, [source]; ld.param.u64 %x1, [target];
        ld.global.v4.b32 {%r1, _, _, %r4}, [%x0];
        st.global.v2.b32 [%x1], {%r4, %r1};
    """
    source, target = np.arange(4, dtype=np.int32) + 1, np.zeros(2, np.int32)
    launch(module(entry("kernel", ["u64 source", "u64 target"], body)), [source, target], block=1)
    assert target.tolist() == [4, 1]


def test_local_memory_is_private_to_each_thread():
    body = """
        ld.param.u64 %x1, [target];
        mov.u32 %r0, %tid.x; mov.u32 %r1, 0;
    LOOP:
        mul.wide.u32 %x2, %r1, 4; mov.u64 %x3, stack; add.u64 %x3, %x3, %x2;
        mad.lo.u32 %r2, %r0, 100, %r1;
        st.local.b32 [%x3], %r2;
        add.u32 %r1, %r1, 1; setp.lt.u32 %p0, %r1, 8; @%p0 bra LOOP;
        and.b32 %r3, %r0, 7;
        mul.wide.u32 %x2, %r3, 4; mov.u64 %x3, stack; add.u64 %x3, %x3, %x2;
        ld.local.b32 %r4, [%x3];
        mul.wide.u32 %x4, %r0, 4; add.u64 %x1, %x1, %x4; st.global.b32 [%x1], %r4;
    """
    target = np.zeros(THREADS, np.int32)
    launch(module(entry("kernel", ["u64 target"], body, registers=".local .align 4 .b8 stack[32];")), [target])
    thread = np.arange(THREADS)
    np.testing.assert_array_equal(target, thread * 100 + thread % 8)


def test_static_and_dynamic_shared_memory_do_not_overlap():
    body = """
        ld.param.u64 %x1, [target];
        mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 2;
        mov.u32 %r2, fixed; add.u32 %r2, %r2, %r1; mov.u32 %r3, extra; add.u32 %r3, %r3, %r1;
        add.u32 %r4, %r0, 1000; add.u32 %r5, %r0, 2000;
        st.shared.b32 [%r2], %r4; st.shared.b32 [%r3], %r5;
        ld.shared.b32 %r6, [%r2]; ld.shared.b32 %r7, [%r3];
        mul.wide.u32 %x2, %r0, 8; add.u64 %x1, %x1, %x2;
        st.global.v2.b32 [%x1], {%r6, %r7};
        mov.u32 %r8, %dynamic_smem_size; setp.eq.u32 %p0, %r0, 0;
        @%p0 st.global.b32 [%x1+512], %r8;
    """
    text = entry("kernel", ["u64 target"], body, registers=".shared .align 4 .b8 fixed[256];")
    ptx = module(text, variables=".extern .shared .align 16 .b8 extra[];\n")
    target = np.zeros(2 * THREADS + 1, np.int32)
    launch(ptx, [target], shared=256)
    thread = np.arange(THREADS)
    np.testing.assert_array_equal(target[:-1].reshape(-1, 2), np.stack([thread + 1000, thread + 2000], 1))
    assert target[-1] == 256


@pytest.mark.parametrize(
    ("space", "expected"), [("global", [1, 0, 0]), ("shared", [0, 1, 0]), ("local", [0, 0, 1])], ids=str
)
def test_isspacep_tells_the_spaces_apart(space: str, expected: list[int]):
    body = f"""
        ld.param.u64 %x0, [target];
        mov.u64 %x1, pool; cvta.shared.u64 %x1, %x1; mov.u64 %x2, stack; cvta.local.u64 %x2, %x2;
        isspacep.{space} %p0, %x0; isspacep.{space} %p1, %x1; isspacep.{space} %p2, %x2;
        selp.b32 %r0, 1, 0, %p0; selp.b32 %r1, 1, 0, %p1; selp.b32 %r2, 1, 0, %p2;
        st.global.b32 [%x0], %r0; st.global.b32 [%x0+4], %r1; st.global.b32 [%x0+8], %r2;
    """
    text = entry("kernel", ["u64 target"], body, registers=".shared .b32 pool; .local .b32 stack;")
    target = np.zeros(3, np.int32)
    launch(module(text), [target], block=1)
    assert target.tolist() == expected


def test_cvta_to_a_space_undoes_cvta():
    body = """
        ld.param.u64 %x0, [target];
        cvta.to.global.u64 %x1, %x0; cvta.global.u64 %x1, %x1; cvta.to.global.u64 %x1, %x1;
        mov.u64 %x2, pool; cvta.shared.u64 %x2, %x2; mov.u32 %r0, 5; st.b32 [%x2], %r0;
        cvta.to.shared.u64 %x2, %x2; ld.shared.b32 %r1, [%x2];
        mov.u64 %x3, stack; cvta.local.u64 %x3, %x3; mov.u32 %r0, 6; st.b32 [%x3], %r0;
        cvta.to.local.u64 %x3, %x3; ld.local.b32 %r2, [%x3];
        st.global.v2.b32 [%x1], {%r1, %r2};
    """
    text = entry("kernel", ["u64 target"], body, registers=".shared .b32 pool; .local .b32 stack;")
    target = np.zeros(2, np.int32)
    launch(module(text), [target], block=1)
    assert target.tolist() == [5, 6]


PARAMETERS = ["u8 a", "s16 b", "u32 c", "f32 d", "f64 e", "u64 target"]


def parameter_kernel() -> str:
    body = """
        ld.param.u64 %x0, [target];
        ld.param.u8 %r0, [a]; ld.param.s16 %r1, [b]; ld.param.u32 %r2, [c];
        ld.param.f32 %f0, [d]; ld.param.f64 %d0, [e];
        cvt.rn.f64.u32 %d1, %r0; cvt.rn.f64.s32 %d2, %r1; cvt.rn.f64.u32 %d3, %r2; cvt.f64.f32 %d4, %f0;
        st.global.f64 [%x0], %d1; st.global.f64 [%x0+8], %d2; st.global.f64 [%x0+16], %d3;
        st.global.f64 [%x0+24], %d4; st.global.f64 [%x0+32], %d0;
    """
    return module(entry("kernel", PARAMETERS, body))


def test_scalars_are_packed_to_their_parameters_size():
    target = np.zeros(5)
    launch(parameter_kernel(), [True, -3, 4_000_000_000, 0.5, 1e300, target], block=1)
    assert target.tolist() == [1, -3, 4_000_000_000, 0.5, 1e300]


def test_parameters_may_come_as_one_packed_block():
    target = np.zeros(5)
    block = struct.pack("<BxhIf4xdQ", 200, -5, 7, 2.0, 3.0, target.ctypes.data)
    buffers = [Buffer(target.ctypes.data, target.nbytes, "target")]
    Emulator(90).launch(parameter_kernel(), "kernel", 1, 1, block, buffers=buffers)
    assert target.tolist() == [200, -5, 7, 2, 3]


def test_struct_parameter_is_read_by_offset():
    body = """
        ld.param.u64 %x0, [target];
        ld.param.v2.b32 {%r0, %r1}, [pair]; ld.param.b8 %r2, [pair+8]; ld.param.u64 %x1, [pair+16];
        cvt.u32.u64 %r3, %x1;
        st.global.v4.b32 [%x0], {%r0, %r1, %r2, %r3};
    """
    text = entry("kernel", ["align PLACE", "u64 target"], body).replace(".align PLACE", ".align 8 .b8 pair[24]")
    target = np.zeros(4, np.int32)
    launch(module(text), [struct.pack("<iiB7xQ", 11, -12, 13, 14), target], block=1)
    assert target.tolist() == [11, -12, 13, 14]


def test_kernel_says_what_its_parameters_are():
    kernel = Emulator(90).load(parameter_kernel()).kernels["kernel"]
    assert [(p.name, p.offset, p.size, p.type) for p in kernel.parameters] == [
        ("a", 0, 1, "u8"),
        ("b", 2, 2, "s16"),
        ("c", 4, 4, "u32"),
        ("d", 8, 4, "f32"),
        ("e", 16, 8, "f64"),
        ("target", 24, 8, "u64"),
    ]
    assert kernel.parameter_bytes == 32
    assert kernel.unsupported is None


@pytest.mark.parametrize("kind", TYPES)
def test_ldu_loads_as_ld_does(kind: str):
    register = REGISTERS[TYPES[kind]]
    body = f"""
        ld.param.u64 %x0, [source]; ld.param.u64 %x1, [target];
        ldu.global.{kind} {register}10, [%x0+{TYPES[kind]}];
        st.global.{kind} [%x1], {register}10;
    """
    source, target = np.arange(16, dtype=np.uint8) + 200, np.zeros(8, np.uint8)
    launch(module(entry("kernel", ["u64 source", "u64 target"], body)), [source, target], block=1)
    np.testing.assert_array_equal(target[: TYPES[kind]], source[TYPES[kind] : 2 * TYPES[kind]])


HINTS = [
    "prefetch.global.L2 [%x0];",
    "prefetch.L1 [%x0];",
    "prefetchu.L1 [%x0];",
    "applypriority.global.L2::evict_normal [%x0], 128;",
    "discard.global.L2 [%x0+128], 128;",
    "createpolicy.fractional.L2::evict_last.b64 %x1, 1.0; st.global.L2::cache_hint.b32 [%x0+8], %r0, %x1;",
    "nanosleep.u32 100;",
    "griddepcontrol.wait; griddepcontrol.launch_dependents;",
    "setmaxnreg.inc.sync.aligned.u32 240;",
]


@pytest.mark.parametrize("hint", HINTS, ids=lambda text: text.split()[0])
def test_hint_changes_nothing(hint: str):
    """Not even what `discard` may destroy on a GPU; that is why nothing reads it here."""
    room = np.zeros(512, np.uint8)
    view = room[-room.ctypes.data % 128 :][:256]
    view[:8] = 9
    body = f"ld.param.u64 %x0, [target]; mov.u32 %r0, 0; {hint} ld.global.b32 %r0, [%x0]; st.global.b32 [%x0+4], %r0;"
    launch(module(entry("kernel", ["u64 target"], body)), [view], block=128)
    assert view[:8].tolist() == [9] * 8


def test_cache_policy_does_not_change_the_value():
    body = """
        ld.param.u64 %x0, [target];
        createpolicy.fractional.L2::evict_last.b64 %x1, 1.0;
        ld.global.L2::cache_hint.b32 %r0, [%x0], %x1;
        st.global.L2::cache_hint.b32 [%x0+4], %r0, %x1;
    """
    target = np.array([9, 0], np.int32)
    launch(module(entry("kernel", ["u64 target"], body)), [target], block=1)
    assert target.tolist() == [9, 9]


def sectors(size: int, *, behind: int = 0) -> np.ndarray:
    """Zeros that begin ``behind`` bytes behind the beginning of a sector of 32 bytes."""
    room = np.zeros(size + 32 + behind, np.uint8)
    return room[-room.ctypes.data % 32 + behind :][:size]


DISTINCT = module(
    entry(
        "kernel",
        ["u64 source", "u64 target", "u64 stride"],
        """
        ld.param.u64 %x0, [source]; ld.param.u64 %x1, [target]; ld.param.u64 %x2, [stride];
        mov.u32 %r0, %tid.x; cvt.u64.u32 %x3, %r0; mul.lo.u64 %x3, %x3, %x2;
        add.u64 %x0, %x0, %x3; add.u64 %x1, %x1, %x3;
        ld.global.v2.b32 {%r1, %r2}, [%x0];
        ld.global.v2.b32 {%r1, %r2}, [%x0];
        st.global.v2.b32 [%x1], {%r1, %r2};
        """,
    )
)


@pytest.mark.parametrize(
    ("stride", "behind", "expected"),
    [(8, 0, THREADS // 4), (8, 8, THREADS // 4 + 1), (64, 0, THREADS), (0, 24, 1)],
    ids=["together", "from the middle of a sector", "apart", "all the same"],
)
def test_distinct_sectors_are_counted_once_in_a_launch(stride: int, behind: int, expected: int):
    source, target = (sectors(max(stride, 8) * THREADS, behind=behind) for _ in range(2))
    for written in (target, source):
        seen = launch(DISTINCT, [source, written, stride], grid=3).statistics
        assert seen.global_load_distinct_sectors == seen.global_store_distinct_sectors == expected
        assert seen.global_load_buffers == seen.global_store_buffers == 1
        assert seen.global_load_sectors >= 2 * 3 * expected
        assert seen.global_store_sectors >= 3 * expected


def test_distinct_sectors_of_several_buffers_add_up():
    """One access may go to several buffers: lanes lie 4096 bytes apart, and so do what they may touch."""
    room = sectors(4096 * THREADS)
    target = sectors(4096 * THREADS)
    pieces = [Buffer(whole.ctypes.data + 4096 * i, 8, f"{i}") for whole in (room, target) for i in range(THREADS)]
    seen = launch(DISTINCT, [room, target, 4096], buffers=pieces).statistics
    assert seen.global_load_distinct_sectors == seen.global_store_distinct_sectors == THREADS
    assert seen.global_load_buffers == seen.global_store_buffers == THREADS
