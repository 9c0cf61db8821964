"""Tiny pictures and tars: two halves of random colour, so that no two pictures are alike."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

UNREADABLE = Path("/proc/self/mem")  # a file that can be opened, and whose first byte is an input/output error
needs_proc = pytest.mark.skipif(not UNREADABLE.is_file(), reason="needs Linux")


def picture(seed: int, width: int = 20, height: int = 16, kind: str = "PNG") -> bytes:
    from PIL import Image  # only here, so that tests are skipped and not broken where the [train] extra is absent

    source = random.Random(seed)
    image = Image.new("RGB", (width, height), tuple(source.randbytes(3)))
    image.paste(tuple(source.randbytes(3)), (0, 0, width // 2, height))
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
