"""Files that appear whole or not at all, also where the process is killed or the power is lost."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

WRITING = ".writing-"
"""Prefix of a file that is not whole yet."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write beside ``path``, which takes its place when the block ends without an error.

    It is on disk before it has the name, and the name is on disk before this returns. Its permissions are those the
    umask gives. A leftover of a killed process is written over.

    Raises:
        OSError: if anything cannot be written; names ``path``.
    """
    beside = path.with_name(WRITING + path.name)
    with naming(path):
        try:
            with open_binary(beside, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the error that led here is the one to report
                beside.unlink(missing_ok=True)
            raise
        synchronise(path.parent)


def open_binary(path: Path, mode: Literal["wb", "ab"]) -> BinaryIO:
    """A file to write to: every byte that a run writes itself passes here."""
    return path.open(mode, buffering=1 << 20)


def synchronise(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk.

    Raises:
        OSError: if they cannot be written; names ``path``.
    """
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as failure:
            if failure.errno != errno.EINVAL:  # the file system synchronises no folders
                raise
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError that names no file, as those of a write do, name ``path``."""
    try:
        yield
    except OSError as failure:
        if failure.errno is None or (failure.filename is not None and WRITING not in str(failure.filename)):
            raise
        raise OSError(failure.errno, failure.strerror, str(path)) from failure
