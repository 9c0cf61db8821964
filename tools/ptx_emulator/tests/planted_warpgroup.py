"""What goes wrong around wgmma: products that nobody waited for, registers and operands touched in flight."""

from __future__ import annotations

from planted import Planted

# A is 64 by 16, B 16 by 8, all ones, in the layout without swizzling; %x20 and %x21 describe them.
OPERANDS = """
.shared .align 128 .b8 tiles[4096];
mov.u32 %r20, tiles; mad.lo.u32 %r21, %r0, 32, %r20; mov.u32 %r22, 0x3C003C00;
st.shared.v4.u32 [%r21], {%r22, %r22, %r22, %r22}; // blamed
st.shared.v4.u32 [%r21+16], {%r22, %r22, %r22, %r22}; // blamed
shr.u32 %r23, %r20, 4; cvt.u64.u32 %x19, %r23; or.b64 %x20, %x19, 0x0000000800400000; // leading 1024, stride 128
add.u64 %x21, %x19, 128; or.b64 %x21, %x21, 0x0000000800080000; // leading 128, stride 128
mov.b32 %c0, 0; mov.b32 %c1, 0; mov.b32 %c2, 0; mov.b32 %c3, 0; setp.eq.u32 %p5, %r0, %r0;
mov.u32 %r24, 0x3C003C00; mov.u32 %r25, %r24; mov.u32 %r26, %r24; mov.u32 %r27, %r24;
"""
VISIBLE = "fence.proxy.async.shared::cta; bar.sync 0;\n"
PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%c0, %c1, %c2, %c3}, %x20, %x21, %p5, 1, 1, 0, 0;"
FROM_REGISTERS = (
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%c0, %c1, %c2, %c3}, {%r24, %r25, %r26, %r27}, %x21, %p5, "
    "1, 1, 0;"
)
FENCE, COMMIT = "wgmma.fence.sync.aligned;\n", "wgmma.commit_group.sync.aligned;\n"
WAIT = "wgmma.wait_group.sync.aligned 0;\n"
USE = "add.f32 %f1, %c0, %c1; // blamed\nshl.b32 %r2, %r0, 0; and.b32 %r2, %r2, 63;\n"


def planted(name: str, kind: str, body: str, **where) -> Planted:
    return Planted(name, kind, OPERANDS + body, threads=128, where=where)


WARPGROUP = [
    planted("result used before the wait", "async_copy", f"{VISIBLE}{FENCE}{PRODUCT}\n{COMMIT}<<{WAIT}|>>{USE}{WAIT}"),
    planted(
        "wait that leaves the newest product in flight",
        "async_copy",
        f"{VISIBLE}{FENCE}{PRODUCT}\n{COMMIT}wgmma.wait_group.sync.aligned <<0|1>>;\n{USE}{WAIT}",
    ),
    planted("product that was not committed", "async_copy", f"{VISIBLE}{FENCE}{PRODUCT}\n<<{COMMIT}|>>{WAIT}{USE}"),
    planted(
        "result overwritten before the wait",
        "async_copy",
        f"{VISIBLE}{FENCE}{PRODUCT}\n{COMMIT}<<{WAIT}|>>mov.b32 %c2, 0; // blamed\n{WAIT}",
    ),
    planted(
        "operand in a register overwritten before the wait",
        "async_copy",
        f"{VISIBLE}{FENCE}{FROM_REGISTERS}\n{COMMIT}<<{WAIT}|>>mov.b32 %r26, 0; // blamed\n{WAIT}",
    ),
    planted(
        "accumulator written without a fence before the product",
        "async_copy",
        f"{VISIBLE}{FENCE}mov.b32 %c1, 0;\n<<{FENCE}|>>{PRODUCT} // blamed\n{COMMIT}{WAIT}",
    ),
    planted(
        "operand in a register written without a fence before the product",
        "async_copy",
        f"{VISIBLE}{FENCE}mov.b32 %r24, 0;\n<<{FENCE}|>>{FROM_REGISTERS} // blamed\n{COMMIT}{WAIT}",
    ),
    planted("no fence at all", "async_copy", f"{VISIBLE}<<{FENCE}|>>{PRODUCT} // blamed\n{COMMIT}{WAIT}"),
    planted(
        "operands stored without a barrier before the product",
        "shared_race",
        f"fence.proxy.async.shared::cta;\n<<bar.sync 0;|>>\n{FENCE}{PRODUCT} // blamed\n{COMMIT}{WAIT}",
    ),
    planted(
        "product issued while a copy to its operand is in flight",
        "async_copy",
        f"""mov.u64 %x22, %x0;
        cp.async.cg.shared.global [%r21], [%x22], 16;
        <<cp.async.wait_all;|>>
        {VISIBLE}{FENCE}{PRODUCT} // blamed
        {COMMIT}
        cp.async.wait_all;
        bar.sync 0;
        {WAIT}""",
    ),
    planted(
        "copy of another warp that is published only after the product is issued",
        "shared_race",
        f"""mov.u64 %x22, %x0;
        cp.async.cg.shared.global [%r21], [%x22], 16; // blamed
        cp.async.wait_all;
        <<{VISIBLE}|>>
        {FENCE}{PRODUCT} // blamed
        {COMMIT}
        <<|{VISIBLE}>>
        {WAIT}""",
    ),
    planted(
        "operand in shared memory overwritten by another warp before the wait",
        "shared_race",
        f"""{VISIBLE}{FENCE}{PRODUCT} // blamed
        {COMMIT}<<{WAIT} bar.sync 0;|>>
        setp.eq.u32 %p6, %r0, 40;
        @%p6 st.shared.u32 [%r20+128], %r0; // blamed
        {WAIT}""",
    ),
    planted(
        "product with lanes missing",
        "divergent_warp",
        f"""{VISIBLE}{FENCE}
        setp.lt.u32 %p6, %r0, <<128|100>>; @!%p6 bra JOIN;
        {PRODUCT} // blamed
        JOIN:
        {COMMIT}{WAIT}""",
        warp=3,
    ),
    planted(
        "descriptor that differs between lanes",
        "matrix",
        f"{VISIBLE}cvt.u64.u32 %x22, %r0; mul.lo.u64 %x22, %x22, <<0|16>>; add.u64 %x20, %x20, %x22;\n"
        f"{FENCE}{PRODUCT} // blamed\n{COMMIT}{WAIT}",
    ),
    planted(
        "operand behind the end of shared memory",
        "out_of_bounds",
        f"{VISIBLE}add.u64 %x20, %x20, <<0|192>>;\n{FENCE}{PRODUCT} // blamed\n{COMMIT}{WAIT}",
        buffer="shared memory",
    ),
]
