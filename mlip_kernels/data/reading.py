"""Reading files: errors that name the file, and progress where it takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlip_kernels.data.packages import require

SECONDS_BEFORE_PROGRESS = 1.0


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Raise every OSError anew as one line that begins with ``path``; those of a read name no file."""
    try:
        yield
    except OSError as failure:
        raise type(failure)(f"{path}: cannot be read: {failure.strerror or failure}") from failure


def read(path: str | Path, limit: int) -> bytes:
    """The first ``limit`` bytes of a file.

    Raises:
        OSError: names the file.
    """
    with naming(path), open(path, "rb") as file:
        return file.read(limit)


def progress(label: str, total: int, unit: str, show: bool) -> Any:
    """A tqdm bar on standard error, drawn only where the work takes longer than a second."""
    return require("tqdm").tqdm(
        desc=label,
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        delay=SECONDS_BEFORE_PROGRESS,
        disable=not show,
        file=sys.stderr,
    )


def notice(line: str) -> None:
    """Write ``line`` to standard error, on a line of its own even while a progress bar is drawn."""
    require("tqdm").tqdm.write(line, file=sys.stderr)
