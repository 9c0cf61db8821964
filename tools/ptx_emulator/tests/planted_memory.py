"""Accesses to memory that is not there, not aligned, not writable or not written."""

from __future__ import annotations

from planted import Planted

MEMORY = [
    Planted(
        "global read behind the end",
        "out_of_bounds",
        "add.u64 %x6, %x4, <<0|4>>;\nld.global.u32 %r2, [%x6]; // blamed\nst.global.u32 [%x5], %r2;",
        where={"block": (0, 0, 0), "warp": 1, "lane": 31, "buffer": "argument 0", "offset": 256},
    ),
    Planted(
        "global write behind the end",
        "out_of_bounds",
        "mad.wide.u32 %x6, %r1, <<128|132>>, %x5;\nst.global.u32 [%x6], %r0; // blamed",
        threads=32,
        blocks=2,
        where={"block": (1, 0, 0), "warp": 0, "lane": 31, "buffer": "argument 1", "offset": 256},
    ),
    Planted(
        "global read before the start",
        "out_of_bounds",
        "add.u64 %x6, %x4, <<0|-4>>;\nld.global.u32 %r2, [%x6]; // blamed\nst.global.u32 [%x5], %r2;",
        where={"warp": 0, "lane": 0},
    ),
    Planted(
        "null pointer",
        "out_of_bounds",
        "mov.u64 %x6, <<%x4|0>>;\nld.global.u32 %r2, [%x6]; // blamed",
        where={"warp": 0, "lane": 0, "address": 0},
    ),
    Planted(
        "atomic behind the end",
        "out_of_bounds",
        "add.u64 %x6, %x1, <<252|256>>;\natom.global.add.u32 %r2, [%x6], 1; // blamed",
        where={"buffer": "argument 1", "offset": 256},
    ),
    Planted(
        "asynchronous copy from behind the end",
        "out_of_bounds",
        "add.u64 %x6, %x4, <<0|4>>;\ncp.async.ca.shared.global [%r10], [%x6], 4; // blamed\ncp.async.wait_all;",
        where={"warp": 1, "lane": 31, "buffer": "argument 0", "offset": 256},
    ),
    Planted(
        "shared read behind the end",
        "out_of_bounds",
        "st.shared.u32 [%r10], %r0;\nbar.sync 0;\nld.shared.u32 %r2, [%r10+<<0|4>>]; // blamed",
        where={"warp": 1, "lane": 31, "buffer": "shared memory", "offset": 256},
    ),
    Planted(
        "shared write behind the end",
        "out_of_bounds",
        "st.shared.u32 [%r10+<<0|252>>], %r0; // blamed",
        where={"warp": 0, "lane": 1, "buffer": "shared memory", "offset": 256},
    ),
    Planted(
        "generic address behind the end of shared memory",
        "out_of_bounds",
        "cvt.u64.u32 %x6, %r10; cvta.shared.u64 %x6, %x6;\nst.u32 [%x6+<<0|4>>], %r0; // blamed",
        where={"warp": 1, "lane": 31},
    ),
    Planted(
        "asynchronous copy to behind the end of shared memory",
        "out_of_bounds",
        "cp.async.ca.shared.global [%r10+<<0|4>>], [%x4], 4; // blamed\ncp.async.wait_all;",
        where={"warp": 1, "lane": 31},
    ),
    Planted(
        "local write behind the end",
        "out_of_bounds",
        "mov.u64 %x6, stack;\nst.local.u32 [%x6+<<28|32>>], %r0; // blamed",
        where={"warp": 0, "lane": 0, "buffer": "local memory", "offset": 32},
    ),
    Planted(
        "local read far behind the end",
        "out_of_bounds",
        "mov.u64 %x6, stack; st.local.u32 [%x6], %r0;\nld.local.u32 %r2, [%x6+<<0|4096>>]; // blamed",
        where={"warp": 0, "lane": 0},
    ),
    Planted(
        "misaligned global read",
        "misaligned",
        "add.u64 %x6, %x0, <<4|2>>;\nld.global.u32 %r2, [%x6]; // blamed",
        where={"warp": 0, "lane": 0},
    ),
    Planted(
        "misaligned vector",
        "misaligned",
        "and.b32 %r2, %r10, -16;\nst.shared.v4.u32 [%r2+<<0|8>>], {%r1, %r1, %r1, %r1}; // blamed",
        threads=1,
        where={"warp": 0, "lane": 0},
    ),
    Planted(
        "misaligned atomic",
        "misaligned",
        "add.u64 %x6, %x1, <<8|4>>;\natom.global.add.u64 %x7, [%x6], 1; // blamed",
    ),
    Planted(
        "misaligned asynchronous copy",
        "misaligned",
        "add.u64 %x6, %x4, <<0|2>>;\nshl.b32 %r3, %r0, 2;\ncp.async.ca.shared.global [%r10], [%x6], 4; // blamed\n"
        "cp.async.wait_all;",
        threads=32,
    ),
    Planted(
        "write to an input",
        "read_only",
        "mov.u64 %x6, <<%x4|%x5>>;\nst.global.u32 [%x6], %r0; // blamed",
        where={"warp": 0, "lane": 0, "buffer": "input", "offset": 0},
    ),
    Planted(
        "atomic on an input",
        "read_only",
        "mov.u64 %x6, <<%x4|%x5>>;\nred.global.add.u32 [%x6], 1; // blamed",
        where={"buffer": "input"},
    ),
    Planted(
        "shared memory that nobody wrote",
        "uninitialised",
        "setp.lt.u32 %p0, %r0, <<64|63>>; @%p0 st.shared.u32 [%r10], %r0;\nbar.sync 0;\n"
        "ld.shared.u32 %r2, [%r10]; // blamed\nst.global.u32 [%x4], %r2;",
        where={"warp": 1, "lane": 31, "offset": 252},
    ),
    Planted(
        "shared memory that only the block before wrote",
        "uninitialised",
        "setp.eq.u32 %p0, %r1, 0; <<|@%p0>> st.shared.u32 [%r10], %r0;\nld.shared.u32 %r2, [%r10]; // blamed",
        blocks=2,
        where={"block": (1, 0, 0)},
    ),
]
