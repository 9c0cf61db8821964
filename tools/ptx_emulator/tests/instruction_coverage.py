"""Which instructions the emulator knows, and which of them its self-tests have executed.

    python tests/instruction_coverage.py

runs the self-tests and prints the table as Markdown.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
TYPES = {f"{kind}{bits}" for kind in "bus" for bits in (8, 16, 32, 64)}
TYPES |= {"f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "tf32", "pred"}

executed: Counter[str] = Counter()
"""How often warps executed each mnemonic in launches that ended without a fault."""


def record(opcodes: dict[str, int]) -> None:
    executed.update(opcodes)


def name_of(mnemonic: str) -> str:
    """As the emulator names its instructions: the base and the first type, ``add.f32`` for ``add.rn.ftz.f32``."""
    base, *modifiers = mnemonic.split(".")
    types = [modifier for modifier in modifiers if modifier in TYPES]
    return ".".join([base, *types[:1]])


def forms() -> dict[str, list[str]]:
    """The mnemonics that were executed, by the name of the instruction."""
    found: dict[str, list[str]] = {}
    for mnemonic in sorted(executed):
        found.setdefault(name_of(mnemonic), []).append(mnemonic)
    return found


def never_executed() -> list[str]:
    from ptx_emulator import instructions

    return sorted(set(instructions()) - set(forms()))


def table() -> str:
    """Markdown: for each instruction the types that were executed, the number of forms, and what never was."""
    from ptx_emulator import instructions

    known: dict[str, list[str]] = {}
    for name in instructions():
        base, _, kind = name.partition(".")
        known.setdefault(base, []).append(kind)
    seen, rows = forms(), []
    for base in sorted(known):
        names = {kind: f"{base}.{kind}" if kind else base for kind in known[base]}
        tested = [kind or "yes" for kind, name in names.items() if name in seen]
        missing = [kind or "no" for kind, name in names.items() if name not in seen]
        count = sum(len(seen[name]) for name in names.values() if name in seen)
        rows.append(f"| `{base}` | {' '.join(tested)} | {count} | {' '.join(missing)} |")
    counted = sum(map(len, known.values()))
    head = (
        f"{counted - len(never_executed())} of {counted} instructions and types executed, in {len(executed)} forms.\n"
    )
    return "\n".join([head, "| instruction | types | forms | never executed |", "|---|---|---|---|", *rows])


def main() -> int:
    import pytest

    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import instruction_coverage

    failed = pytest.main(["-q", "--no-header", "--tb=short", str(HERE)])
    print(instruction_coverage.table())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
