"""Logs of a run: a CSV file to read back, TensorBoard and Weights & Biases to watch."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from mlip_kernels.train import files
from mlip_kernels.train.files import naming, replacing, synchronise

COLUMNS = ("step", "name", "value")


class WandbRun:
    """The scalars of a run for Weights & Biases; a resumed run continues there too.

    Args:
        folder: of the run, which names it; an id is kept there.
        project: that it belongs to.
        config: plain values to show.

    Raises:
        ImportError: if the package ``wandb`` is absent.
        ValueError: if it cannot begin, for example without an account; the message says why.
    """

    def __init__(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ModuleNotFoundError as failure:
            raise ImportError("report_to: expected an installed wandb, found none: pip install wandb") from failure
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "wandb-id"
        identity = kept.read_text(encoding="utf-8") if kept.exists() else None
        try:
            self._run = wandb.init(
                project=project, name=folder.name, dir=str(folder), config=config, id=identity, resume="allow"
            )
        except wandb.Error as failure:
            raise ValueError(f"report_to: wandb: {failure}; WANDB_MODE=offline keeps a run on disk") from failure
        with replacing(kept) as file:
            file.write(self._run.id.encode())

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Send one value per name."""
        self._run.log(scalars, step=step)

    def close(self) -> None:
        """Finish the run there."""
        self._run.finish()


class Logs:
    """Rows of ``metrics.csv`` (``step, name, value``) and the same scalars for TensorBoard.

    Args:
        folder: of the run.
        first_step: rows of this step and later are leftovers of an interrupted run and are dropped.
        again: names that the run will write once more for the step before ``first_step``; their rows are dropped.
        wandb: gets the same scalars, and is closed with the logs.

    Raises:
        OSError: here and in every method, if a file cannot be read or written; names it.
        ValueError: if ``metrics.csv`` holds something else; names the line.
    """

    def __init__(
        self, folder: Path, first_step: int, again: Collection[str] = (), wandb: WandbRun | None = None
    ) -> None:
        self._wandb = wandb
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.csv"
        kept = [
            (step, name, repr(value))
            for step, name, value in (read(self.path) if self.path.exists() else [])
            if step < first_step - 1 or (step == first_step - 1 and name not in again)
        ]
        with replacing(self.path) as file:
            file.write(_table([COLUMNS, *kept]))
        self._file = files.open_binary(self.path, "ab")
        self._tensorboard_folder = folder / "tensorboard"
        with naming(self._tensorboard_folder):
            self._tensorboard = SummaryWriter(str(self._tensorboard_folder), purge_step=first_step)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Append one value per name for ``step`` and flush."""
        with naming(self.path):
            self._file.write(_table([(step, name, repr(value)) for name, value in scalars.items()]))
            self._file.flush()
        with naming(self._tensorboard_folder):
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.write(step, scalars)

    def note(self, step: int, text: str) -> None:
        """Show ``text`` in TensorBoard."""
        with naming(self._tensorboard_folder):
            self._tensorboard.add_text("resumed", text, step)

    def synchronise(self) -> None:
        """Wait until everything written so far is on disk."""
        with naming(self.path):
            os.fsync(self._file.fileno())
        with naming(self._tensorboard_folder):
            self._tensorboard.flush()
        for path in (*self._tensorboard_folder.iterdir(), self._tensorboard_folder):
            synchronise(path)

    def close(self) -> None:
        """Finish both files."""
        if self._wandb is not None:
            self._wandb.close()
        with naming(self.path):
            self._file.close()
        with naming(self._tensorboard_folder):
            self._tensorboard.close()


def _table(rows: list[tuple]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def read(path: Path) -> list[tuple[int, str, float]]:
    """The rows of a ``metrics.csv``; a last row that a killed process left unfinished is passed over.

    Raises:
        OSError: if the file cannot be read; names it.
        ValueError: if the file holds something else; names it and the line.
    """
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line end is unfinished
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            step, name, value = line.decode().rstrip("\r").split(",")
            rows.append((int(step), name, float(value)))
        except ValueError as failure:
            raise ValueError(
                f"{path}, line {number}: expected a step, a name and a value, got {line[:80]!r}"
            ) from failure
    return rows
