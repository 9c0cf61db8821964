"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from mlip_kernels.train.files import naming


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other processes from training in ``folder`` until the block ends.

    The lock lies on the file ``.lock`` in it and belongs to the process: the system drops it with the process,
    however that ends, so none is ever left behind. Where the file system has no locks, a warning says so.

    Raises:
        ValueError: if another process holds the folder; names the process.
        OSError: if the folder cannot be made or written to; names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with contextlib.ExitStack() as stack:
        with naming(path):
            file = stack.enter_context(open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+"))
            _lock(file, folder)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def _lock(file: TextIO, folder: Path) -> None:
    try:
        # Not flock: that would live on in data workers, which outlast a killed run for some seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as failure:
        if failure.errno in (errno.EAGAIN, errno.EACCES):
            raise ValueError(
                f"output: {folder} is in use by another run ({file.read(200).strip() or 'just starting'}); "
                "wait for it, stop it, or give another --output"
            ) from None
        if failure.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        warnings.warn(f"{folder} cannot be locked ({failure}); let one run at a time use it", stacklevel=4)
