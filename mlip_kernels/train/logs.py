"""Logs of a run: a CSV file to read back, and TensorBoard to watch."""

from __future__ import annotations

import csv
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Logs:
    """Rows of ``metrics.csv`` (``step, name, value``) and the same scalars for TensorBoard.

    Args:
        folder: of the run.
        first_step: rows of this step and later are leftovers of an interrupted run and are dropped.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.csv"
        kept = [row for row in read(self.path) if row[0] < first_step] if self.path.exists() else []
        self._file = self.path.open("w", newline="")
        self._rows = csv.writer(self._file)
        self._rows.writerow(("step", "name", "value"))
        self._rows.writerows((step, name, repr(value)) for step, name, value in kept)
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Append one value per name for ``step`` and flush."""
        for name, value in scalars.items():
            self._rows.writerow((step, name, repr(value)))
            self._tensorboard.add_scalar(name, value, step)
        self._file.flush()

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        self._tensorboard.close()


def read(path: Path) -> list[tuple[int, str, float]]:
    """The rows of a ``metrics.csv``; a last row that a killed process left unfinished is passed over."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [(int(row[0]), row[1], float(row[2])) for row in rows if len(row) == 3 and row[2]]
