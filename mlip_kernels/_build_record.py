"""``_build.json``: what became of each compiled part, and how to recognise its library.

A library that was copied in part maps pages that are not there: loading it ends the process (SIGBUS) where no exception
could. So the build notes size and checksum of each library, and nothing is loaded that differs from them.

``python -m mlip_kernels._build_record`` notes them anew, for packagers whose tools rewrite libraries (strip, patchelf).
Only the standard library is imported: `setup.py` loads this file by its path.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

NAME = "_build.json"
PARTS = ("cpu", "cuda")
BLOCK, MOST_BLOCKS = 64 << 10, 32


def read(package: Path) -> dict[str, Any]:
    """The record in the folder of the package: each part as ``"ok"`` or its reason, and more; else empty."""
    try:
        record = json.loads((package / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write(package: Path, record: dict[str, Any]) -> None:
    """Write the record, with size and checksum of every library that is there, in one step."""
    libraries = {part: package / f"_{part}.so" for part in PARTS}
    files = {file.name: fingerprint(file) for part, file in libraries.items() if record.get(part) == "ok"}
    unfinished = package / f"{NAME}.unfinished"
    unfinished.write_text(json.dumps({**record, "files": files}, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(package / NAME)


def fingerprint(library: Path) -> dict[str, int]:
    """Size and checksum of a library: of all of it up to 2 MiB, else of 32 blocks spread from first to last byte.

    Spread blocks find what goes wrong with files in practice (cut short, holes, zeros at the end, another file) in a
    millisecond; they do not find a single bit that was flipped between them.
    """
    with library.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        blocks = min(MOST_BLOCKS, -(-size // BLOCK))
        checksum = 0
        for i in range(blocks):
            file.seek(i * max(0, size - BLOCK) // max(1, blocks - 1))
            checksum = zlib.crc32(file.read(BLOCK), checksum)
    return {"bytes": size, "crc32": checksum}


def damage(package: Path, part: str) -> str:
    """What is wrong with the library of a part that was built; ``""`` if it is as the build left it."""
    library = package / f"_{part}.so"
    noted = read(package).get("files")
    expected = noted.get(library.name) if isinstance(noted, dict) else None
    if not isinstance(expected, dict):
        return f"{library} is not recorded in {NAME}"
    if not library.is_file():
        return f"{library} is not a file"
    try:
        found = fingerprint(library)
    except OSError as failure:
        return f"{library} cannot be read: {failure.strerror or failure}"
    if found == expected:
        return ""
    if found["bytes"] != expected.get("bytes"):
        return f"{library} has {found['bytes']} bytes, not the {expected.get('bytes')} that were built"
    return f"{library} has the size but not the content that was built"


def main() -> None:
    """Note the libraries as they are now."""
    package = Path(__file__).resolve().parent
    record = read(package)
    for part in PARTS:
        if (package / f"_{part}.so").exists():
            record[part] = "ok"
    write(package, record)
    print(f"wrote {package / NAME}")


if __name__ == "__main__":
    main()
