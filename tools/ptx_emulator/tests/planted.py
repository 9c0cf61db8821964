"""Kernels with one bug each, and the same kernels without it.

A body holds alternatives ``<<right|wrong>>``. A line of the wrong version that may be blamed ends in ``// blamed``.
Available: %r0 the thread, %r1 the block, %x0 and %x1 the buffers ``first`` and ``second`` of 64 words each, %r10 the
address of the thread's word in the shared array ``pool`` of 256 bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ptx_text import entry, module

PROLOGUE = """
ld.param.u64 %x0, [first]; ld.param.u64 %x1, [second]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x;
mov.u32 %r10, pool; mad.lo.u32 %r10, %r0, 4, %r10; mul.wide.u32 %x2, %r0, 4; mul.wide.u32 %x3, %r0, 16;
add.u64 %x4, %x0, %x2; add.u64 %x5, %x1, %x2;
"""
DECLARED = ".shared .align 16 .b8 pool[256]; .local .align 16 .b8 stack[32]; .reg .b32 %c<64>;"


@dataclass(frozen=True)
class Planted:
    name: str
    kind: str
    body: str
    threads: int = 64
    blocks: int = 1
    where: dict = field(default_factory=dict)
    """Fields of the fault that are known: block, warp, lane, buffer, offset."""

    def text(self, wrong: bool) -> str:
        body = re.sub(r"<<([^|]*)\|([^>]*)>>", lambda m: m[2] if wrong else m[1], self.body)
        return module(entry("planted", ["u64 first", "u64 second"], PROLOGUE + body, registers=DECLARED))

    def blamed(self) -> set[int]:
        return {n for n, line in enumerate(self.text(wrong=True).splitlines(), 1) if "// blamed" in line}
