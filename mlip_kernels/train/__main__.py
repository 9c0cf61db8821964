"""Command line of the trainer: ``mlip-train`` or ``python -m mlip_kernels.train``."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlip_kernels._extras import needing

if TYPE_CHECKING:
    from mlip_kernels.train.config import TrainConfig
    from mlip_kernels.train.loop import Outcome

INTERRUPTED = 130
"""Exit code of a run that a signal stopped before it could end by itself."""


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that the command-line ``arguments`` describe."""
    import tyro

    from mlip_kernels.train.config import PRESETS, TrainConfig
    from mlip_kernels.train.open_clip_options import translated

    description = f"""Train an MLIP-style model on image-text pairs.

Options of open_clip_train are understood where there is a counterpart. Under torchrun it uses all processes.
--preset {{{",".join(PRESETS)}}} chooses what the other options start from.
A run stopped by Ctrl-C or SIGTERM checkpoints first; --resume continues it."""
    arguments = translated(arguments)
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
    return tyro.cli(TrainConfig, args=arguments, default=PRESETS[preset], description=description, prog="mlip-train")


def summary(outcome: Outcome) -> str:
    """What a run ends by printing."""
    pairs = outcome.retrieval.similarity.shape[0]
    lines = [f"held-out retrieval among {pairs} candidates", f"{'':18}{'before':>10}{'after':>10}"]
    for name, after in outcome.after.items():
        lines.append(f"{name:18}{outcome.before[name]:>10.1%}{after:>10.1%}")
    lines.append(f"training throughput: {outcome.pairs_per_second:.1f} pairs/s over {outcome.steps} steps")
    for name, share in outcome.zeroshot.items():
        lines.append(f"zero-shot classification, {name.removeprefix('zeroshot_')}: {share:.1%}")
    if outcome.steps < outcome.planned:
        lines.append(f"stopped at step {outcome.steps} of {outcome.planned}; the same command with --resume continues")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says.

    Bad input, a file that cannot be read or written and a missing package end with one line on standard error and
    exit code 2; a signal where the loop cannot checkpoint, with one line and exit code 130.
    """
    leads = int(os.environ.get("RANK", 0)) == 0
    config = None
    try:
        with _signals(), needing("train", "mlip-train"):
            config = parse(sys.argv[1:] if arguments is None else arguments)
            from mlip_kernels.train.loop import train
            from mlip_kernels.train.processes import OtherProcessError
            from mlip_kernels.train.report import write_report  # now, so that a missing package shows before the work
            from mlip_kernels.train.resume import MODEL

            try:
                outcome = train(config)
            except OtherProcessError:  # which says what is wrong
                return 2
            if outcome is not None and leads:
                print(outcome.data.report())
                print(summary(outcome))
                print(f"model: {Path(config.output) / MODEL}, for MLIP.from_pretrained and mlip-export")
                try:
                    print(f"report: {write_report(outcome, config)}")
                except Exception as failure:  # the run is finished, whatever a picture of it may need
                    _say("warning", f"the run is finished, but its report could not be drawn: {_one_line(failure)}")
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as failure:
        if leads or not isinstance(failure, FloatingPointError):  # which all processes raise alike
            _say("error", _one_line(failure))
        return 2
    except KeyboardInterrupt:
        if leads:
            _say("stopped", _what_is_left(config))
        return INTERRUPTED
    return 0


def _what_is_left(config: TrainConfig | None) -> str:
    from mlip_kernels.train.checkpoint import checkpoints

    saved = checkpoints(Path(config.output) / "checkpoints") if config is not None else []
    if config is None or not saved:
        return "before anything was saved"
    return f"{saved[-1]} is saved; the same command with --resume continues from it"


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM stop what Ctrl-C stops, in the same way."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread, and refuses handlers from any other
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(kind: str, message: str) -> None:
    print(f"mlip-train: {kind}: {message}", file=sys.stderr)


def _one_line(failure: BaseException) -> str:
    """The message of an error, the file first where the system names one."""
    if isinstance(failure, OSError) and failure.filename is not None:
        return f"{failure.filename}: {failure.strerror}"
    return " ".join(str(failure).split()) or type(failure).__name__


def command() -> int:
    """`main` for a command of its own: ``mlip-train`` and ``python -m mlip_kernels.train``.

    OpenMP threads that wait for each other spin by default, which beside other work makes a step many times longer:
    the one that is waited for is not running. How they wait is read when torch is loaded, so unless it was chosen, the
    command starts itself anew with threads that sleep.
    """
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys()
    if not chosen and os.environ.get("OMP_NUM_THREADS") != "1" and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "OMP_WAIT_POLICY": "passive"})
    return main()


if __name__ == "__main__":
    sys.exit(command())
