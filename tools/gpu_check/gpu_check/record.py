"""Results that survive whatever comes after them: one line of JSON a case, written at once."""

from __future__ import annotations

import contextlib
import json
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CASE_SECONDS = 20


class Recorder:
    """Appends the results of one phase to a file.

    Args:
        path: of the file, with results of other phases in it.
        phase: name of the phase.
    """

    def __init__(self, path: Path, phase: str) -> None:
        self.path, self.phase = path, phase

    def write(self, name: str, **facts: Any) -> None:
        """Append one result."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"phase": self.phase, "name": name, **facts}) + "\n")

    @contextlib.contextmanager
    def case(self, name: str, seconds: int = CASE_SECONDS) -> Iterator[dict[str, Any]]:
        """Run a case under an alarm: what it puts into the dictionary is written, or the error that ended it."""
        facts: dict[str, Any] = {}
        began = time.perf_counter()
        signal.signal(signal.SIGALRM, _alarm)
        signal.alarm(seconds)
        try:
            yield facts
        except Exception as failure:  # one case must not end the others; what failed is in the report
            facts = {"error": _told(failure)}
        finally:
            signal.alarm(0)
            self.write(name, seconds=round(time.perf_counter() - began, 3), **facts)


def _alarm(*_: Any) -> None:
    raise TimeoutError("the case took too long")


def _told(failure: Exception) -> str:
    last = traceback.extract_tb(failure.__traceback__)[-1]
    return f"{type(failure).__name__}: {str(failure)[:400]} ({Path(last.filename).name}:{last.lineno})"


def read(path: Path) -> list[dict[str, Any]]:
    """All results in a file; a line that was cut short by the end of a process is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found
