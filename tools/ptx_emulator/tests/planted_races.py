"""Accesses that no barrier orders: between warps, between the lanes of a warp, between blocks."""

from __future__ import annotations

from planted import Planted

SHARED_EXCHANGE = """
    st.shared.u32 [%r10], %r0; // blamed
    <<bar.sync 0;|>>
    xor.b32 %r2, %r0, 32; mov.u32 %r3, pool; mad.lo.u32 %r3, %r2, 4, %r3;
    ld.shared.u32 %r4, [%r3]; // blamed
    st.global.u32 [%x4], %r4;
"""
RACES = [
    Planted("read without a barrier after a write", "shared_race", SHARED_EXCHANGE),
    Planted(
        "write without a barrier after a read",
        "shared_race",
        """
        st.shared.u32 [%r10], %r0; bar.sync 0;
        xor.b32 %r2, %r0, 32; mov.u32 %r3, pool; mad.lo.u32 %r3, %r2, 4, %r3;
        ld.shared.u32 %r4, [%r3]; // blamed
        <<bar.sync 0;|>>
        add.u32 %r4, %r4, 100;
        st.shared.u32 [%r10], %r4; // blamed
        """,
    ),
    Planted(
        "two warps write one word",
        "shared_race",
        """
        mov.u32 %r2, pool; setp.eq.u32 %p0, %r0, 0; setp.eq.u32 %p1, %r0, 32;
        @%p0 st.shared.u32 [%r2], %r0; // blamed
        <<bar.sync 0;|>>
        @%p1 st.shared.u32 [%r2], %r0; // blamed
        """,
    ),
    Planted(
        "barrier of another number",
        "shared_race",
        """
        st.shared.u32 [%r10], %r0; // blamed
        shr.u32 %r5, %r0, 5; add.u32 %r5, %r5, 1;
        <<barrier.sync 1, 64;|barrier.sync %r5, 32;>>
        xor.b32 %r2, %r0, 32; mov.u32 %r3, pool; mad.lo.u32 %r3, %r2, 4, %r3;
        ld.shared.u32 %r4, [%r3]; // blamed
        """,
    ),
    Planted(
        "arriving where one should wait",
        "shared_race",
        """
        setp.lt.u32 %p0, %r0, 32; @!%p0 bra CONSUMER;
        st.shared.u32 [%r10], %r0; // blamed
        bar.arrive 1, 64; bra DONE;
        CONSUMER:
        <<bar.sync 1, 64;|bar.arrive 1, 64;>>
        ld.shared.u32 %r4, [%r10+-128]; // blamed
        DONE:
        """,
    ),
    Planted(
        "shared memory reused in a loop",
        "shared_race",
        """
        mov.u32 %r5, 0;
        xor.b32 %r2, %r0, 32; mov.u32 %r3, pool; mad.lo.u32 %r3, %r2, 4, %r3;
        LOOP:
        add.u32 %r6, %r5, %r0;
        st.shared.u32 [%r10], %r6; // blamed
        bar.sync 0;
        ld.shared.u32 %r4, [%r3]; // blamed
        <<bar.sync 0;|>>
        add.u32 %r5, %r5, 1; setp.lt.u32 %p0, %r5, 3; @%p0 bra LOOP;
        """,
    ),
    Planted(
        "atomic beside a plain read in shared memory",
        "shared_race",
        """
        mov.u32 %r2, pool; setp.eq.u32 %p0, %r0, 0; @%p0 st.shared.u32 [%r2], %r1; bar.sync 0;
        atom.shared.add.u32 %r3, [%r2], 1; // blamed
        <<bar.sync 0;|>>
        ld.shared.u32 %r4, [%r2]; // blamed
        """,
    ),
    Planted(
        "lanes of a warp exchange without bar.warp.sync",
        "warp_race",
        """
        st.shared.u32 [%r10], %r0; // blamed
        <<bar.warp.sync 0xFFFFFFFF;|>>
        xor.b32 %r2, %r0, 1; mov.u32 %r3, pool; mad.lo.u32 %r3, %r2, 4, %r3;
        ld.shared.u32 %r4, [%r3]; // blamed
        """,
        threads=32,
    ),
    Planted(
        "lanes of a warp overwrite what others still read",
        "warp_race",
        """
        st.shared.u32 [%r10], %r0; bar.warp.sync 0xFFFFFFFF;
        xor.b32 %r2, %r0, 1; mov.u32 %r3, pool; mad.lo.u32 %r3, %r2, 4, %r3;
        ld.shared.u32 %r4, [%r3]; // blamed
        <<bar.warp.sync 0xFFFFFFFF;|>>
        add.u32 %r4, %r4, 100;
        st.shared.u32 [%r10], %r4; // blamed
        """,
        threads=32,
    ),
    Planted(
        "bar.warp.sync of half the lanes",
        "warp_race",
        """
        st.shared.u32 [%r10], %r0; // blamed
        setp.lt.u32 %p0, %r0, 16; @%p0 bra LOWER;
        bar.warp.sync 0xFFFF0000; bra JOIN;
        LOWER: bar.warp.sync 0x0000FFFF;
        JOIN:
        <<bar.warp.sync 0xFFFFFFFF;|>>
        xor.b32 %r2, %r0, 16; mov.u32 %r3, pool; mad.lo.u32 %r3, %r2, 4, %r3;
        ld.shared.u32 %r4, [%r3]; // blamed
        """,
        threads=32,
    ),
    Planted(
        "ldmatrix of what other lanes stored",
        "warp_race",
        """
        mov.u32 %r2, pool; and.b32 %r3, %r0, 7; mad.lo.u32 %r3, %r3, 16, %r2;
        st.shared.u32 [%r10], %r0; // blamed
        <<bar.warp.sync 0xFFFFFFFF;|>>
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r3]; // blamed
        """,
        threads=32,
    ),
    Planted(
        "lanes store different values to one word",
        "warp_race",
        "mov.u32 %r2, pool; mov.u32 %r3, <<%r1|%r0>>;\nst.shared.u32 [%r2], %r3; // blamed",
        threads=32,
    ),
    Planted(
        "lanes exchange through global memory without bar.warp.sync",
        "warp_race",
        """
        st.global.u32 [%x4], %r0; // blamed
        <<bar.warp.sync 0xFFFFFFFF;|>>
        xor.b32 %r2, %r0, 1; mad.wide.u32 %x6, %r2, 4, %x0;
        ld.global.u32 %r3, [%x6]; // blamed
        """,
        threads=32,
    ),
    Planted(
        "warps exchange through global memory without a barrier",
        "global_race",
        """
        st.global.u32 [%x4], %r0; // blamed
        <<bar.sync 0;|>>
        xor.b32 %r2, %r0, 32; mad.wide.u32 %x6, %r2, 4, %x0;
        ld.global.u32 %r3, [%x6]; // blamed
        """,
    ),
    Planted(
        "blocks write one word",
        "global_race",
        "mad.wide.u32 %x6, %r1, <<4|0>>, %x0; setp.eq.u32 %p0, %r0, 0; add.u32 %r2, %r1, 5;\n"
        "@%p0 st.global.u32 [%x6], %r2; // blamed",
        blocks=2,
        where={"block": (1, 0, 0), "buffer": "argument 0", "offset": 0},
    ),
    Planted(
        "block reads what another block writes",
        "global_race",
        """
        mad.wide.u32 %x6, %r1, 128, %x4; xor.b32 %r2, %r1, <<0|1>>; mad.wide.u32 %x7, %r2, 128, %x4;
        add.u32 %r4, %r0, 5;
        st.global.u32 [%x6], %r4; // blamed
        ld.global.u32 %r3, [%x7]; // blamed
        """,
        threads=32,
        blocks=2,
        where={"block": (1, 0, 0)},
    ),
    Planted(
        "sum without an atomic",
        "global_race",
        """
        setp.eq.u32 %p0, %r0, 0; add.u32 %r2, %r1, 1;
        @!%p0 ret;
        <<red.global.add.u32 [%x0], %r2;|ld.global.u32 %r3, [%x0]; add.u32 %r3, %r3, %r2; // blamed>>
        <<|st.global.u32 [%x0], %r3; // blamed>>
        """,
        blocks=3,
    ),
    Planted(
        "atomic beside a plain write of another block",
        "global_race",
        """
        setp.eq.u32 %p0, %r0, 0; setp.eq.u32 %p1, %r1, 0; and.pred %p1, %p1, %p0; add.u32 %r2, %r1, 7;
        @%p1 <<red.global.add.u32 [%x0], %r2|st.global.u32 [%x0], %r2>>; // blamed
        setp.ne.u32 %p2, %r1, 0; and.pred %p0, %p0, %p2;
        @%p0 red.global.add.u32 [%x0], 1; // blamed
        """,
        blocks=2,
    ),
]
