"""The last of the self-tests: nothing that the emulator knows was left unexecuted by them."""

from __future__ import annotations

import instruction_coverage
from ptx_emulator import instructions


def test_every_instruction_was_executed(whole_suite):
    missing = instruction_coverage.never_executed()
    assert not missing, f"never executed by a self-test: {' '.join(missing)}\n{instruction_coverage.table()}"


def test_table_lists_every_instruction_once():
    rows = instruction_coverage.table().splitlines()
    bases = {name.split(".")[0] for name in instructions()}
    assert len(rows) == 4 + len(bases)
    assert all(any(row.startswith(f"| `{base}` |") for row in rows) for base in bases)
