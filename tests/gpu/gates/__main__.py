"""Prints, checks or remakes the table of GPU kernels: ``PYTHONPATH=tests/gpu:tools/ptx_emulator python -m gates``."""

from __future__ import annotations

import argparse
import sys

from gates import budgets, choices, judge, page, report, table
from gates.cases import OPERATORS
from gates.promises import Operator


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gates", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--markdown", action="store_true", help="print the checked-in table as Markdown (the default)")
    what.add_argument("--check", action="store_true", help="measure again and say what got worse; exit status 1 if so")
    what.add_argument(
        "--update", action="store_true", help="measure again and write kernels.json, and all made from it"
    )
    what.add_argument("--choices", action="store_true", help="write what auto takes, as the model of the table says")
    parser.add_argument(
        "--only",
        nargs="+",
        default=(),
        metavar="NAME",
        help="with --check or --update: only the operators of these names, or those that launch kernels of these names",
    )
    arguments = parser.parse_args()
    operators = OPERATORS
    if arguments.only:
        if not arguments.check and not arguments.update:
            parser.error("--only: needs --check or --update")
        try:
            operators = table.launching(arguments.only)
        except ValueError as unknown:
            parser.error(f"--only: {unknown}")
    if arguments.check:
        return check(operators)
    if arguments.update:
        rows = table.measured(operators)
        table.save(table.replaced(table.load(), rows, operators) if arguments.only else rows)
        page.PATH.write_text(page.markdown(table.load()), encoding="utf-8")
        print(f"wrote {table.PATH} and {page.PATH}")
    if arguments.update or arguments.choices:
        print("\n".join(choices.write(table.load())))
        return 0
    print(report.markdown(table.load()), end="")
    return 0


def check(operators: tuple[Operator, ...]) -> int:
    """Measure what can be measured here, and print what is wrong with it."""
    from gates import measure

    recorded, complaints = table.load(), []
    for backend, architectures in measure.ARCHITECTURES.items():
        if reason := measure.missing(backend):
            print(f"{backend}: not checked: {reason}")
            continue
        if (compiler := measure.compiler(backend)) != recorded.made_with[backend]:
            print(f"{backend}: compiled by {compiler}, but the table was made with {recorded.made_with[backend]}")
        for arch in architectures:
            rows = measure.compiled(backend, arch, operators)
            in_table = table.of(recorded.compiled, backend=backend, arch=arch, operators=operators)
            complaints += judge.promises(rows.values(), operators)
            complaints += judge.against_table(rows, in_table)
        for arch in measure.EXECUTED:
            rows = measure.traffic(backend, arch, operators)
            in_table = table.of(recorded.traffic, backend=backend, arch=arch, operators=operators)
            complaints += judge.against_table(rows, in_table)
        wanted = budgets.of(operators)
        complaints += judge.slopes(backend, measure.slopes(backend, wanted), recorded.slopes, wanted)
    print("\n".join([*complaints, judge.REGENERATE]) if complaints else "nothing got worse")
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
