"""Command line of the trainer: ``mlip-train`` or ``python -m mlip_kernels.train``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import tyro

from mlip_kernels.train.config import PRESETS, TrainConfig
from mlip_kernels.train.loop import Outcome, train
from mlip_kernels.train.report import write_report

DESCRIPTION = f"""Train an MLIP-style model on image-text pairs.

Under torchrun it uses all processes. --preset {{{",".join(PRESETS)}}} chooses what the other options start from.
A run stopped by Ctrl-C or SIGTERM checkpoints first; --resume continues it."""


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that the command-line ``arguments`` describe."""
    arguments = list(arguments)
    preset = "small"
    for place, argument in enumerate(arguments):
        if argument == "--preset" and place + 1 < len(arguments):
            preset = arguments[place + 1]
            del arguments[place : place + 2]
            break
        if argument.startswith("--preset="):
            preset = argument.partition("=")[2]
            del arguments[place]
            break
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    return tyro.cli(TrainConfig, args=arguments, default=PRESETS[preset], description=DESCRIPTION, prog="mlip-train")


def summary(outcome: Outcome, config: TrainConfig) -> str:
    """What a run ends by printing."""
    pairs = outcome.retrieval.similarity.shape[0]
    lines = [f"held-out retrieval among {pairs} candidates", f"{'':18}{'before':>10}{'after':>10}"]
    for name, after in outcome.after.items():
        lines.append(f"{name:18}{outcome.before[name]:>10.1%}{after:>10.1%}")
    lines.append(f"training throughput: {outcome.pairs_per_second:.1f} pairs/s over {outcome.steps} steps")
    if outcome.steps < config.steps:
        lines.append(f"stopped at step {outcome.steps} of {config.steps}; the same command with --resume continues")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; bad input ends with one line on standard error and exit code 2."""
    leads = int(os.environ.get("RANK", 0)) == 0
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        outcome = train(config)
    except (ValueError, TypeError, FileNotFoundError, ImportError, FloatingPointError) as failure:
        print(f"mlip-train: error: {failure}", file=sys.stderr)
        return 2
    if outcome is not None and leads:
        print(outcome.data.report())
        print(summary(outcome, config))
        print(f"report: {write_report(outcome, config)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
