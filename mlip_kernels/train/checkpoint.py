"""Checkpoints: written atomically with a checksum, read as plain tensors and values only.

A checkpoint is what ``torch.save`` writes, a zip archive, and the comment that the format lets an archive end with
holds the checksum. ``torch.load`` and ``unzip`` read it as any other.
"""

from __future__ import annotations

import hashlib
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mlip_kernels.train.files import WRITING, replacing, synchronise

_NAME = re.compile(r"step-(\d{8,})\.pt")
_CHECKSUM = b"blake2b-256 "
_COMMENT = len(_CHECKSUM) + 64
_EMPTY, _FULL = struct.pack("<H", 0), struct.pack("<H", _COMMENT)
"""The length of the archive's comment, in the two bytes before it: as ``torch.save`` writes it, and here."""


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step that the name of a checkpoint tells.

    Raises:
        ValueError: if it is not named as a checkpoint.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path}: expected a checkpoint, named like step-00000100.pt")
    return int(match[1])


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write ``state`` as the checkpoint of ``step`` and drop all but the newest ``keep``.

    The file appears under its name only when it is whole on disk, so that a process killed at any moment, or a loss
    of power, leaves the previous checkpoint usable.

    Raises:
        OSError: if it cannot be written; names the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    with replacing(path) as file:
        writer = _Digesting(file)
        try:
            torch.save(state, writer)  # type: ignore[arg-type]  # it calls write and flush alone
        except RuntimeError:
            if writer.failure is not None:  # torch reports a failed write by an assertion about positions
                raise writer.failure from None
            raise
        file.seek(-len(_EMPTY), 1)
        file.write(_FULL + _CHECKSUM + writer.digest.hexdigest().encode())
    for stale in (*checkpoints(folder)[:-keep], *folder.glob(WRITING + "*")):
        stale.unlink(missing_ok=True)
    return path


class _Digesting:
    """A file for ``torch.save`` that knows the digest of what went into it, and the first write that failed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.blake2b(digest_size=32)
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            written = self.file.write(data)
        except OSError as failure:
            self.failure = failure
            raise
        self.digest.update(data)
        return written

    def flush(self) -> None:
        """The file is flushed when it is whole."""


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running any code in it.

    Raises:
        OSError: if the file cannot be read; names it.
        ValueError: if the file is not what `save` wrote, to the bit; the message names it.
    """
    found = _checksum_of(path)
    if found is None:
        raise ValueError(f"{path}: not a whole checkpoint: no checksum at its end")
    stored, computed = found
    if stored != computed:
        raise ValueError(f"{path}: the checkpoint is damaged: its checksum differs from its content")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as failure:  # whole, but not of `save`: torch's own advice would be to run the code in it
        raise ValueError(
            f"{path}: not a checkpoint of this trainer: it holds more than tensors and plain values "
            f"({type(failure).__name__})"
        ) from failure
    if not isinstance(state, dict):
        raise ValueError(f"{path}: not a checkpoint of this trainer: expected a dict, got {type(state).__name__}")
    return state


def _checksum_of(path: Path) -> tuple[bytes, bytes] | None:
    """The checksum that a checkpoint ends with and that of its content, in hexadecimal; None where it has none."""
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        content = file.seek(0, 2) - _COMMENT - len(_EMPTY)
        if content < 0:
            return None
        file.seek(content)
        end = file.read()
        if not end.startswith(_FULL + _CHECKSUM):
            return None
        file.seek(0)
        while content:
            block = file.read(min(content, 1 << 20))
            digest.update(block)
            content -= len(block)
    digest.update(_EMPTY)
    return end[len(_FULL + _CHECKSUM) :], digest.hexdigest().encode()


def set_aside(folder: Path, after: int) -> list[Path]:
    """Rename the checkpoints of steps later than ``after``, so that nothing continues from them; the new paths."""
    aside = []
    for path in checkpoints(folder):
        if step_of(path) > after:
            aside.append(path.rename(path.with_name(path.name + ".aside")))
    if aside:
        synchronise(folder)
    return aside
