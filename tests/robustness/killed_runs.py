"""Kill a run and resume it, over and over; its weights and logs have to be those of a run that nothing happened to.

A script of its own, which forks: ``python tests/robustness/killed_runs.py FOLDER KILLS [SEED]``. A process is killed
with SIGKILL at a random one of its steps, opened files, writes into a checkpoint, waits for the disk, renamings and
removals. A run that reaches its end is compared, and the next one begins.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_run import configuration, write_pairs

from mlip_kernels.testing import assert_identical
from mlip_kernels.train import TrainConfig, checkpoint, logs, loop, train

MOMENTS = {"step": 8, "open": 12, "write": 300, "fsync": 10, "os.rename": 4, "os.remove": 4}
"""When to kill, and before which occurrence of it at the latest."""


def forked(work: Callable[[], object]) -> int:
    """Exit code of ``work`` in a child, negative where a signal ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def kill_at(moment: str, occurrence: int, folder: Path) -> None:
    """Let this process die before the ``occurrence``-th ``moment`` in ``folder``."""
    left = occurrence

    def watch(event: str, arguments: tuple) -> None:
        nonlocal left
        if event == moment and (event in ("step", "write", "fsync") or str(arguments[0]).startswith(str(folder))):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    for event, owner, name in (
        ("step", loop.Run, "_optimise"),
        ("write", checkpoint._Digesting, "write"),
        ("fsync", os, "fsync"),
    ):
        setattr(owner, name, announced(event, getattr(owner, name)))
    sys.addaudithook(watch)


def announced(event: str, function: Callable) -> Callable:
    def announcing(*arguments: object) -> object:
        sys.audit(event)
        return function(*arguments)

    return announcing


def state(config: TrainConfig) -> tuple[dict, list[tuple[int, str, float]]]:
    """The last checkpoint and the rows of the log, without what may differ: how the run was called, and its speed."""
    folder = Path(config.output)
    content = checkpoint.load(checkpoint.checkpoints(folder / "checkpoints")[-1])
    del content["config"]
    rows = [row for row in logs.read(folder / "metrics.csv") if row[1] != "pairs_per_second"]
    return content, rows


def compare(found: object, expected: object, name: str) -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert_identical(found, expected, name=name)
    elif isinstance(expected, dict):
        assert isinstance(found, dict)
        assert found.keys() == expected.keys(), name
        for key in expected:
            compare(found[key], expected[key], f"{name}.{key}")
    else:
        assert found == expected, f"{name}: expected {expected}, got {found}"


def victim(config: TrainConfig, moment: str, occurrence: int | None) -> None:
    if occurrence is not None:
        kill_at(moment, occurrence, Path(config.output))
    train(config)


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    source = random.Random(seed)
    config = dataclasses.replace(configuration(write_pairs(folder), folder / "whole"), log_every=1, evaluate_every=4)
    assert forked(lambda: train(config)) == 0
    expected, expected_rows = state(config)
    done, finished, survived = 0, 0, True
    while done < kills or not survived:
        run = dataclasses.replace(config, output=str(folder / f"killed-{finished}"), resume=True)
        moment = source.choice(list(MOMENTS))
        occurrence = source.randint(1, MOMENTS[moment])

        code = forked(functools.partial(victim, run, moment, occurrence if done < kills else None))
        survived = code == 0
        assert survived or code == -signal.SIGKILL, f"exit code {code} after {done} kills"
        if survived:
            found, rows = state(run)
            compare(found, expected, run.output)
            assert rows == expected_rows, run.output
            finished += 1
        else:
            done += 1
            print(f"killed before {moment} {occurrence} of run {finished}", flush=True)
    print(f"{done} kills, {finished} runs, all like the whole one")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
