"""Members of webdataset shards: tar files read from front to back, in which no damage passes for an end."""

from __future__ import annotations

import gzip
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from mlip_kernels.data.reading import naming

BLOCK = tarfile.BLOCKSIZE
LARGEST_EXTENSION = 2**20
"""Bytes of a long name or of PAX fields."""
LONGEST_PADDING = 2**20
"""Bytes behind the end mark that are looked through for members that a stray end mark would hide."""
LARGEST_EXPANSION = 100
"""Of a gzip shard, beside 64 MiB: pictures hardly shrink, but zeros do so a thousandfold."""

EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class DamagedShardError(OSError):
    """A shard that is no whole tar file; the message names it and says what is wrong."""


class _Header(tarfile.TarInfo):
    """A damaged or cut header is an error; tarfile takes it, unless it is the first, for the end of the file."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end mark
            raise
        except tarfile.EmptyHeaderError as failure:  # type: ignore[attr-defined]
            raise tarfile.ReadError("no end mark: it was cut, or its writer did not finish") from failure
        except tarfile.TruncatedHeaderError as failure:  # type: ignore[attr-defined]
            raise tarfile.ReadError("cut within a header") from failure
        except tarfile.HeaderError as failure:
            raise tarfile.ReadError(f"damaged header: {failure}") from failure

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in EXTENSIONS and header.size > LARGEST_EXTENSION):
            raise tarfile.ReadError(f"damaged header: {header.size} bytes")
        return header


class _Bounded:
    """Reads of a decompressed stream, which end with an error at ``limit`` bytes."""

    def __init__(self, stream: gzip.GzipFile, limit: int) -> None:
        self.stream, self.left = stream, limit

    def read(self, size: int) -> bytes:
        data = self.stream.read1(size)  # what lies before damage is given before the error
        self.left -= len(data)
        if self.left < 0:
            raise tarfile.ReadError(f"it expands to more than {LARGEST_EXPANSION} times its size")
        return data


def members(path: str, limit: Callable[[str], int]) -> Iterator[tuple[str, bytes | None]]:
    """Name and content of every regular file in the shard at ``path``, a tar file or one packed by gzip.

    Content of more than ``limit(name)`` bytes is not read and given as None. Memory stays within twice the largest
    limit and a few MiB, whatever the headers claim and however far gzip expands.

    Raises:
        DamagedShardError: once the members before the damage have been given.
        OSError: the file cannot be opened or read; names it.
    """
    try:
        with open(path, "rb") as file:
            stream: Any = file
            if file.peek(2)[:2] == b"\x1f\x8b":
                size = os.fstat(file.fileno()).st_size
                stream = _Bounded(gzip.GzipFile(fileobj=file), LARGEST_EXPANSION * size + 2**26)
            with tarfile.open(
                fileobj=stream, mode="r|", bufsize=2**15, tarinfo=_Header, encoding="utf-8", errors="replace"
            ) as tar:
                for info in tar:
                    tar.members = []  # type: ignore[attr-defined]  # or they pile up
                    if info.isreg():
                        content = tar.extractfile(info) if info.size <= limit(info.name) else None
                        yield info.name, None if content is None else content.read()
                assert tar.fileobj is not None
                if tar.fileobj.read(LONGEST_PADDING).strip(b"\0"):
                    raise tarfile.ReadError("data behind its end mark")
    except (gzip.BadGzipFile, tarfile.TarError, EOFError, zlib.error, ValueError, RecursionError) as failure:
        raise DamagedShardError(f"{path}: cannot read the shard: {failure or type(failure).__name__}") from failure
    except OSError as failure:
        with naming(path):
            raise failure


def check_ends(path: str) -> None:
    """What can be told of a shard without reading it: the first header, and the end mark where it is not packed.

    Raises:
        DamagedShardError, OSError: as `members`.
    """
    with naming(path), open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - BLOCK))
        whole = packed or (size % BLOCK == 0 and not file.read().strip(b"\0"))
    next(members(path, lambda _: 0), None)
    if not whole:
        raise DamagedShardError(f"{path}: cannot read the shard: no end mark: it was cut, or its writer did not finish")
