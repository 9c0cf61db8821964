"""Pairs listed in a CSV, one row each: open_clip's format."""

from __future__ import annotations

import csv
import os
from array import array
from pathlib import Path

from torch import Tensor

from mlip_kernels.data.config import DataConfig
from mlip_kernels.data.images import decode
from mlip_kernels.data.pairs import Pairs


class CsvPairs(Pairs):
    """The rows of ``path`` whose caption is not empty.

    Raises:
        FileNotFoundError: the CSV or an image does not exist; names the file, and for an image the row.
        ValueError: a column is absent, an image path is empty, or the file cannot be read as CSV in UTF-8.
    """

    def __init__(self, path: str, config: DataConfig) -> None:
        self.name = path
        self.folder = Path(path).parent
        self.size = config.image_size
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.lines = array("q")
        self.empty_captions = 0
        self.corrupt: set[str] = set()
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                self._read(csv.DictReader(file, delimiter=config.csv_separator), config)
        except (UnicodeDecodeError, csv.Error) as failure:
            raise ValueError(f"{path}: cannot be read as CSV in UTF-8: {failure}") from failure
        if not self.keys:
            raise ValueError(f"{path}: no row with an image and a caption ({self.empty_captions} empty captions)")

    def _read(self, reader: csv.DictReader[str], config: DataConfig) -> None:
        header = reader.fieldnames or []
        for field in ("csv_image_key", "csv_caption_key"):
            column = getattr(config, field)
            if column not in header:
                raise ValueError(
                    f"{field}: {self.name} has no column {column!r}; separated at {config.csv_separator!r} its header "
                    f"reads {list(header)}"
                )
        for row in reader:
            image = (row[config.csv_image_key] or "").strip()
            caption = (row[config.csv_caption_key] or "").strip()
            if not image:
                raise ValueError(f"{self.name}, line {reader.line_num}: no path in column {config.csv_image_key!r}")
            if not os.path.isfile(self.folder / image):
                raise FileNotFoundError(f"{self.name}, line {reader.line_num}: no such image: {self.folder / image}")
            if not caption:
                self.empty_captions += 1
                continue
            self.keys.append(image)
            self.captions.append(caption)
            self.lines.append(reader.line_num)

    def image(self, index: int) -> Tensor | None:
        return decode((self.folder / self.keys[index]).read_bytes(), self.size)

    def describe(self, index: int) -> str:
        return f"{self.name}, line {self.lines[index]}: {self.keys[index]}"
