"""Small PTX modules written by hand: they need no compiler, only the emulator."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from edge_values import WIDTHS

HEADER = ".version 8.4\n.target sm_90a\n.address_size 64\n"


def module(*entries: str, variables: str = "") -> str:
    return HEADER + variables + "\n".join(entries)


def entry(name: str, parameters: Sequence[str], body: str, *, registers: str = "") -> str:
    """A kernel with plenty of registers: %r and %s (32 bit), %x (64), %h (16), %f, %d (floats), %p, %q (predicates)."""
    listed = ",\n".join(f"    .param .{p.split()[0]} {p.split()[1]}" for p in parameters)
    declared = ".reg .b32 %r<64>, %s<64>; .reg .b64 %x<64>; .reg .b16 %h<32>; .reg .f32 %f<64>; .reg .f64 %d<32>;"
    text = textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    return f"""
.visible .entry {name}(
{listed}
)
{{
    {declared}
    .reg .pred %p<16>, %q<16>;
{textwrap.indent(registers, "    ")}
{text}
    ret;
}}
"""


def register_type(kind: str) -> str:
    return "pred" if kind == "pred" else f"b{max(WIDTHS[kind], 16)}"


def elementwise(name: str, template: str, inputs: Sequence[str], outputs: Sequence[str]) -> str:
    """A kernel that runs one instruction per thread on element ``thread`` of arrays, one array per operand.

    ``template`` names the operands {a}, {b}, {c}, {e} and the results {d}, {d2}.
    """
    names = dict(zip("abce", (f"%in{n}" for n in range(len(inputs))), strict=False))
    names |= dict(zip(("d", "d2"), (f"%out{n}" for n in range(len(outputs))), strict=False))
    lines = [".reg .b32 %t<8>; .reg .b64 %address<16>; .reg .pred %beyond, %unused; .reg .b16 %flag<8>;"]
    lines += [f".reg .{register_type(kind)} %in{n};" for n, kind in enumerate(inputs)]
    lines += [f".reg .{register_type(kind)} %out{n};" for n, kind in enumerate(outputs)]
    lines += [
        "mov.u32 %t0, %ctaid.x; mov.u32 %t1, %ntid.x; mov.u32 %t2, %tid.x; mad.lo.u32 %t0, %t0, %t1, %t2;",
        "ld.param.u32 %t1, [count]; setp.ge.u32 %beyond, %t0, %t1; @%beyond bra DONE;",
    ]
    for n, kind in enumerate([*inputs, *outputs]):
        lines.append(f"ld.param.u64 %address{n}, [array{n}]; mul.wide.u32 %address15, %t0, {WIDTHS[kind] // 8};")
        lines.append(f"add.u64 %address{n}, %address{n}, %address15;")
    for n, kind in enumerate(inputs):
        if kind == "pred":
            lines.append(f"ld.global.u8 %flag{n}, [%address{n}]; setp.ne.u16 %in{n}, %flag{n}, 0;")
        else:
            lines.append(f"ld.global.b{WIDTHS[kind]} %in{n}, [%address{n}];")
    lines.append(template.format(**names))
    for n, kind in enumerate(outputs):
        address = f"%address{len(inputs) + n}"
        if kind == "pred":
            lines.append(f"selp.u16 %flag7, 1, 0, %out{n}; st.global.u8 [{address}], %flag7;")
        else:
            lines.append(f"st.global.b{WIDTHS[kind]} [{address}], %out{n};")
    arrays = ",\n".join(f"    .param .u64 array{n}" for n in range(len(inputs) + len(outputs)))
    body = "\n".join("    " + line for line in lines)
    return f".visible .entry {name}(\n{arrays},\n    .param .u32 count\n)\n{{\n{body}\nDONE:\n    ret;\n}}\n"
