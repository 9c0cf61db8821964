"""Kernels to time the emulator with; they need no compiler."""

from __future__ import annotations

import time
from collections.abc import Callable

from ptx_text import entry, module

LOOP = """
    ld.param.u64 %x0, [out]; mov.u32 %r0, %tid.x; cvt.rn.f32.u32 %f0, %r0; mov.u32 %r1, 0; mov.f32 %f1, %f0;
    mov.u32 %r10, pool; mad.lo.u32 %r11, %r0, 4, %r10; xor.b32 %r12, %r0, 32; mad.lo.u32 %r12, %r12, 4, %r10;
LOOP:
    {}
    fma.rn.f32 %f1, %f1, %f0, %f0; min.f32 %f1, %f1, %f0; mul.rn.f32 %f2, %f1, %f0; add.rn.f32 %f1, %f2, %f0;
    xor.b32 %r2, %r1, %r0; add.u32 %r1, %r1, 1; setp.lt.u32 %p0, %r1, {}; @%p0 bra LOOP;
    mul.wide.u32 %x1, %r0, 4; add.u64 %x0, %x0, %x1; st.global.f32 [%x0], %f1;
"""
EXCHANGE = "st.shared.f32 [%r11], %f1; bar.sync 0; ld.shared.f32 %f1, [%r12]; ld.shared.f32 %f3, [%r11]; bar.sync 0;"


def _kernel(extra: str, rounds: int) -> str:
    return module(entry("kernel", ["u64 out"], LOOP.format(extra, rounds), registers=".shared .b32 pool[256];"))


ARITHMETIC = _kernel("", 2000)
"""Registers only."""
MIXED = _kernel(EXCHANGE, 500)
"""One exchange through shared memory, with its two barriers, to eight other instructions."""


def seconds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Shortest time of each function; they take turns, so that a disturbance meets all of them."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
    return best
