"""Pairs listed in a CSV, one row each: open_clip's format."""

from __future__ import annotations

import csv
import io
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from mlip_kernels.data.batch import LONGEST_CAPTION
from mlip_kernels.data.config import DataConfig
from mlip_kernels.data.images import MAX_BYTES, load
from mlip_kernels.data.pairs import Pairs
from mlip_kernels.data.reading import naming, progress, read

LONGEST_LINE = 2**24
"""Bytes; so that a file of another kind is not taken into memory in search of the end of its line."""


class CsvPairs(Pairs):
    """The rows of ``path`` whose caption is not empty.

    Nothing is passed over in silence: every row has as many fields as the header, and a quoted field that spans lines
    is closed before a separator or the end of a line and holds no other row. Text behind a closing quote on the same
    line is kept, as pandas does, with which open_clip reads.

    Raises:
        FileNotFoundError: the CSV or an image does not exist; names it, and for an image the row.
        OSError: the CSV cannot be read; names it.
        ValueError: a column is absent or there twice, a row has another number of fields, no image path or a caption
            of more than `LONGEST_CAPTION` characters, a quote is not closed, a byte is no UTF-8 or NUL; names the
            file and the line.
    """

    def __init__(self, path: str, config: DataConfig, *, show_progress: bool = True) -> None:
        self.name = path
        self.folder = Path(path).parent
        self.size = config.image_size
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.lines = array("q")
        self.empty_captions = 0
        self.corrupt: dict[str, str] = {}
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        self._read(self._records(config.csv_separator, show_progress), config)
        if not self.keys:
            raise ValueError(f"{path}: no row with an image and a caption ({self.empty_captions} empty captions)")

    def _read(self, records: Iterator[tuple[int, list[str]]], config: DataConfig) -> None:
        _, header = next(records, (1, []))
        columns = []
        for field in ("csv_image_key", "csv_caption_key"):
            column = getattr(config, field)
            if header.count(column) != 1:
                found = "several columns" if column in header else "no column"
                raise ValueError(
                    f"{field}: {self.name} has {found} {column!r}; separated at {config.csv_separator!r} its header "
                    f"reads {header}"
                )
            columns.append(header.index(column))
        for line, row in records:
            where = f"{self.name}, line {line}"
            if len(row) != len(header):
                raise ValueError(
                    f"{where}: expected {len(header)} fields separated at {config.csv_separator!r} as in the header, "
                    f"got {len(row)}"
                )
            image, caption = (row[column].strip() for column in columns)
            if len(caption) > LONGEST_CAPTION:
                raise ValueError(f"{where}: expected at most {LONGEST_CAPTION:,} characters, got {len(caption):,}")
            if not image:
                raise ValueError(f"{where}: no path in column {config.csv_image_key!r}")
            if not os.path.isfile(self.folder / image):
                raise FileNotFoundError(f"{where}: no such image: {str(self.folder / image)!r}")
            if not caption:
                self.empty_captions += 1
                continue
            self.keys.append(image)
            self.captions.append(caption)
            self.lines.append(line)

    def _records(self, separator: str, show_progress: bool) -> Iterator[tuple[int, list[str]]]:
        """The first line and the fields of every row that is not blank."""
        held: list[str] = []

        def hold() -> Iterator[str]:
            for line in self._lines(show_progress):
                held.append(line)
                yield line
            yield ""  # a quote still open at the end takes this in, and so spans lines

        reader = csv.reader(hold(), delimiter=separator)
        while True:
            held.clear()
            first = reader.line_num + 1
            try:
                fields = next(reader, None)
                if reader.line_num > first:
                    next(csv.reader(held, delimiter=separator, strict=True))
            except csv.Error as failure:
                quote = "a quote opens a field that is not closed: " if reader.line_num > first else ""
                raise ValueError(f"{self.name}, line {first}: {quote}{failure}") from failure
            if fields is None:
                return
            for field in fields if reader.line_num > first else ():
                self._refuse_rows_within(field, first, separator)
            if fields:
                yield first, fields

    def _lines(self, show_progress: bool) -> Iterator[str]:
        number = 0
        with naming(self.name), open(self.name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            with progress(f"reading {Path(self.name).name}", size, "B", show_progress) as bar:
                while data := file.readline(LONGEST_LINE):
                    number += 1
                    bar.update(len(data))
                    # some files end their lines with a carriage return alone
                    yield from io.StringIO(self._text(number, data), newline="")

    def _text(self, number: int, data: bytes) -> str:
        if len(data) == LONGEST_LINE:
            raise ValueError(f"{self.name}, line {number}: expected less than {LONGEST_LINE:,} bytes in a line")
        try:
            text = data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as failure:
            hint = ", as UTF-16 begins" if number == 1 and data.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
            raise ValueError(
                f"{self.name}: cannot be read as CSV in UTF-8: line {number} has the byte "
                f"0x{data[failure.start]:02x} at {failure.start + 1}{hint}"
            ) from failure
        if "\0" in text:
            raise ValueError(f"{self.name}, line {number}: a NUL byte, expected text in UTF-8")
        return text

    def _refuse_rows_within(self, field: str, first: int, separator: str) -> None:
        """A quote too many, and another rows below, make of all rows between them one caption of several lines."""
        for line in field.splitlines():
            for part in line.split(separator) if separator in line else ():
                if os.path.isfile(self.folder / part.strip()):
                    raise ValueError(
                        f"{self.name}, line {first}: a quote opens a field that takes in another row, with the image "
                        f"{part.strip()}; expected the closing quote before it"
                    )

    def image(self, index: int) -> Tensor:
        return load(read(self.folder / self.keys[index], MAX_BYTES + 1), self.size)

    def describe(self, index: int) -> str:
        return f"{self.name}, line {self.lines[index]}: {self.keys[index]}"
