"""The differential fuzzer: ``python -m robustness.fuzz --inputs 50000 --seed 0`` (with tests/ on the path).

Input number i of a seed is always the same: a valid call with hard shapes, layouts and values, which has to be as
right as the reference. (Invalid arguments need no chance: test_error_table.py tries all.) The inputs run in a process
of their own, so that one which crashes it is named like one that fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from robustness import compare
from robustness.cases import OPERATORS
from robustness.draws import Draw


def check(seed: int, number: int) -> str:
    """Run one input; raise what it raises, with a note of what was called. Returns the operator's name."""
    draw = Draw(f"{seed}/{number}")
    case = OPERATORS[draw.choice(tuple(OPERATORS))](draw)
    arguments = ", ".join(f"{name}={described(value)}" for name, value in case.arguments.items())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compare.run(case, draw)
    except Exception as failure:
        raise AssertionError(
            f"{again(seed, number)}\n  {case.operator}({arguments}), values: {draw.values}\n"
            f"  {type(failure).__name__}: {failure}"
        ) from failure
    return case.operator


def described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"a tensor {list(value.shape)}, {value.dtype}, strides {list(value.stride())}"


def again(seed: int, number: int) -> str:
    """The command that runs one input alone."""
    return f"PYTHONPATH=tests python -m robustness.fuzz --seed {seed} --only {number}"


def _run(seed: int, first: int, last: int, keep_going: bool, progress: Path) -> int:
    """Run the inputs from ``first`` up to ``last``, noting each before it starts."""
    failures, done = 0, Counter()
    with progress.open("wb", buffering=0) as note:
        for number in range(first, last):
            note.seek(0)
            note.write(f"{number:12}".encode())
            try:
                done[check(seed, number)] += 1
            except AssertionError as failure:
                print(failure, flush=True)
                failures += 1
                if not keep_going:
                    break
    print(f"{sum(done.values())} inputs hold, {failures} fail: {dict(sorted(done.items()))}", flush=True)
    return 1 if failures else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m robustness.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="which")
    parser.add_argument("--only", type=int, help="run this input alone, in this process, with its traceback")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first that fails")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.only is not None:
        try:
            print(check(options.seed, options.only), "holds")
        except AssertionError:
            traceback.print_exc()
            return 1
        return 0
    if options.worker:
        first, last, progress = options.worker
        return _run(options.seed, int(first), int(last), options.keep_going, Path(progress))

    status, first = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        while first < options.inputs:
            command = [sys.executable, "-m", "robustness.fuzz", "--seed", str(options.seed)]
            command += ["--worker", str(first), str(options.inputs), str(progress)]
            code = subprocess.run([*command, *["--keep-going"] * options.keep_going], check=False).returncode
            if code in (0, 1):
                return max(status, code)
            if not progress.exists():
                return code
            number = int(progress.read_text())
            print(f"{again(options.seed, number)}\n  the process ended with status {code}", flush=True)
            status, first = 1, number + 1
            if not options.keep_going:
                return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
