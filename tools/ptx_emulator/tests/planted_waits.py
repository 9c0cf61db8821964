"""Barriers that not everybody reaches, warps with lanes missing, copies and products that nobody waited for."""

from __future__ import annotations

from planted import Planted

LANES_MISSING = "setp.lt.u32 %p0, %r0, <<32|16>>; @!%p0 bra JOIN;\n{} // blamed\nJOIN:\n"
WARP_WIDE = {
    "shuffle": "shfl.sync.bfly.b32 %r2, %r0, 1, 31, 0xFFFFFFFF;",
    "vote": "vote.sync.ballot.b32 %r2, %p0, 0xFFFFFFFF;",
    "match": "match.any.sync.b32 %r2, %r0, 0xFFFFFFFF;",
    "redux": "redux.sync.add.u32 %r2, %r0, 0xFFFFFFFF;",
    "elect": "elect.sync _|%p1, 0xFFFFFFFF;",
    "warp barrier": "bar.warp.sync 0xFFFFFFFF;",
    "ldmatrix": "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r3];",
    "stmatrix": "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {%r2};",
    "mma": "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%c0, %c1, %c2, %c3}, {%c4, %c5}, {%c6}, "
    "{%c0, %c1, %c2, %c3};",
}
PREPARED = (
    "mov.u32 %r3, pool; and.b32 %r4, %r0, 7; mad.lo.u32 %r3, %r4, 16, %r3; st.shared.u32 [%r10], %r0;\n"
    "bar.warp.sync 0xFFFFFFFF;\n"
)

BARRIERS = [
    *[
        Planted(
            f"{name} with lanes missing",
            "divergent_warp",
            PREPARED + LANES_MISSING.format(instruction),
            threads=32,
            where={"warp": 0},
        )
        for name, instruction in WARP_WIDE.items()
    ],
    Planted(
        "shuffle from a lane that is not in its mask",
        "divergent_warp",
        """
        setp.lt.u32 %p0, %r0, 16; @!%p0 bra JOIN;
        shfl.sync.idx.b32 %r2, %r0, <<3|20>>, 31, 0x0000FFFF; // blamed
        JOIN:
        """,
        threads=32,
        where={"warp": 0, "lane": 0},
    ),
    Planted(
        "barrier inside a divergent branch",
        "divergent_barrier",
        """
        setp.lt.u32 %p0, %r0, <<64|16>>; @!%p0 bra JOIN;
        bar.sync 0; // blamed
        JOIN:
        """,
        where={"warp": 0, "lane": 0},
    ),
    Planted(
        "barrier that the lanes of a warp reach one half after the other",  # a GPU allows it without .aligned
        "divergent_barrier",
        """
        and.b32 %r2, %r0, <<32|1>>; setp.eq.u32 %p0, %r2, 0; @%p0 bra OTHER;
        barrier.sync 0; // blamed
        bra JOIN;
        OTHER:
        barrier.sync 0; // blamed
        JOIN:
        """,
    ),
    Planted(
        "guarded barrier",
        "divergent_barrier",
        "setp.ne.u32 %p0, %r0, <<64|33>>;\n@%p0 bar.sync 0; // blamed",
        where={"warp": 1},
    ),
    Planted(
        "warps wait at different barriers",
        "deadlock",
        """
        shr.u32 %r2, %r0, 5; setp.eq.u32 %p0, %r2, 0; @%p0 bra FIRST;
        bar.sync <<1|2>>; bra JOIN; // blamed
        FIRST:
        bar.sync 1; // blamed
        JOIN:
        """,
    ),
    Planted(
        "barrier that one of two warps skips",
        "deadlock",
        """
        setp.ge.u32 %p0, %r0, <<64|32>>; @%p0 bra JOIN;
        bar.sync 1, 64; // blamed
        JOIN:
        """,
        where={"warp": 0},
    ),
    Planted(
        "barrier that waits for more threads than there are",
        "deadlock",
        "bar.sync 1, <<64|96>>; // blamed",
    ),
    Planted(
        "barrier with a number that does not exist",
        "barrier",
        "mov.u32 %r2, <<15|16>>;\nbarrier.sync %r2; // blamed",
    ),
    Planted(
        "barrier for part of a warp",
        "barrier",
        "bar.sync 1, <<64|48>>; // blamed",
    ),
    Planted(
        "barrier with counts that disagree",
        "barrier",
        "shr.u32 %r2, %r0, 5; mad.lo.u32 %r3, %r2, <<0|32>>, 64;\nbarrier.sync 1, %r3; // blamed",
    ),
    Planted("trap", "trap", "setp.eq.u32 %p0, %r0, <<99|37>>;\n@%p0 trap; // blamed", where={"warp": 1, "lane": 5}),
    Planted(
        "infinite loop",
        "instruction_limit",
        """
        mov.u32 %r2, 0;
        LOOP: // blamed
        add.u32 %r2, %r2, <<1|0>>; // blamed
        setp.lt.u32 %p0, %r2, 10; // blamed
        @%p0 bra LOOP; // blamed
        """,
    ),
    Planted(
        "block that waits for a later block",
        "instruction_limit",
        """
        setp.eq.u32 %p0, %r1, <<1|0>>; @%p0 bra WAIT;
        mov.u32 %r2, 1; st.relaxed.gpu.global.u32 [%x0], %r2; bra DONE;
        WAIT:
        ld.relaxed.gpu.global.u32 %r3, [%x0]; // blamed
        setp.ne.u32 %p1, %r3, 1; // blamed
        @%p1 bra WAIT; // blamed
        DONE:
        """,
        threads=32,
        blocks=2,
        where={"block": (0, 0, 0)},
    ),
]

COPY = "cp.async.ca.shared.global [%r10], [%x4], 4;"
COPIES = [
    Planted(
        "read before the wait",
        "async_copy",
        f"{COPY} cp.async.commit_group; <<cp.async.wait_group 0;|>>\nld.shared.u32 %r2, [%r10]; // blamed\n",
        where={"warp": 0, "lane": 0},
    ),
    Planted(
        "wait that leaves the newest group in flight",
        "async_copy",
        f"{COPY} cp.async.commit_group; cp.async.wait_group <<0|1>>;\nld.shared.u32 %r2, [%r10]; // blamed\n",
    ),
    Planted(
        "wait without a commit",
        "async_copy",
        f"{COPY} <<cp.async.commit_group;|>> cp.async.wait_group 0;\nld.shared.u32 %r2, [%r10]; // blamed\n",
    ),
    Planted(
        "write before the wait",
        "async_copy",
        f"{COPY} <<cp.async.wait_all;|>>\nst.shared.u32 [%r10], %r0; // blamed\ncp.async.wait_all;",
    ),
    Planted(
        "two copies to one place",
        "async_copy",
        f"{COPY} <<cp.async.wait_all;|>>\ncp.async.ca.shared.global [%r10], [%x5], 4; // blamed\ncp.async.wait_all;",
    ),
    Planted(
        "copy into what another warp still reads",
        "shared_race",
        f"""
        st.shared.u32 [%r10], %r0; bar.sync 0;
        xor.b32 %r2, %r0, 32; mov.u32 %r3, pool; mad.lo.u32 %r3, %r2, 4, %r3;
        ld.shared.u32 %r4, [%r3]; // blamed
        <<bar.sync 0;|>>
        {COPY} // blamed
        cp.async.wait_all;
        """,
    ),
    Planted(
        "copy of another warp without a barrier after the wait",
        "shared_race",
        f"""
        {COPY} // blamed
        cp.async.wait_all;
        <<bar.sync 0;|>>
        xor.b32 %r2, %r0, 32; mov.u32 %r3, pool; mad.lo.u32 %r3, %r2, 4, %r3;
        ld.shared.u32 %r4, [%r3]; // blamed
        """,
    ),
    Planted(
        "copy of another lane without bar.warp.sync after the wait",
        "warp_race",
        f"""
        {COPY} // blamed
        cp.async.wait_all;
        <<bar.warp.sync 0xFFFFFFFF;|>>
        xor.b32 %r2, %r0, 1; mov.u32 %r3, pool; mad.lo.u32 %r3, %r2, 4, %r3;
        ld.shared.u32 %r4, [%r3]; // blamed
        """,
        threads=32,
    ),
    Planted(
        "wait after the barrier instead of before it",
        "shared_race",
        f"""
        {COPY} // blamed
        cp.async.commit_group;
        <<cp.async.wait_group 0;|>>
        bar.sync 0;
        <<|cp.async.wait_group 0;>>
        xor.b32 %r2, %r0, 32; mov.u32 %r3, pool; mad.lo.u32 %r3, %r2, 4, %r3;
        ld.shared.u32 %r4, [%r3]; // blamed
        """,
    ),
    Planted(
        "source overwritten by another warp while the copy is in flight",
        "global_race",
        f"""
        {COPY} // blamed
        <<cp.async.wait_all; bar.sync 0;|>>
        xor.b32 %r2, %r0, 32; mad.wide.u32 %x6, %r2, 4, %x0; add.u32 %r3, %r2, 500;
        st.global.u32 [%x6], %r3; // blamed
        cp.async.wait_all;
        """,
    ),
]
