"""Tiny sources of training data, made where they are needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_sources import picture, write_tar

from mlip_kernels.data import DataConfig


@pytest.fixture
def make_csv(tmp_path: Path) -> Callable[..., Path]:
    """Write a CSV of ``rows`` pairs; ``corrupt`` and ``empty`` name rows with a damaged image or no caption."""

    def make(rows: int = 40, corrupt: tuple[int, ...] = (), empty: tuple[int, ...] = (), name: str = "pairs") -> Path:
        lines = ["filepath\ttitle"]
        for row in range(rows):
            data = picture(row)
            (tmp_path / f"{name}{row}.png").write_bytes(data[: len(data) // 2] if row in corrupt else data)
            lines.append(f"{name}{row}.png\t{'  ' if row in empty else f'picture number {row}'}")
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join(lines) + "\n")
        return path

    return make


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., str]:
    """Write ``shards`` tars of ``each`` pairs; samples are numbered through."""

    def make(
        shards: int = 3, each: int = 8, corrupt: tuple[int, ...] = (), empty: tuple[int, ...] = (), name: str = "train"
    ) -> str:
        for shard in range(shards):
            members = {}
            for sample in range(shard * each, (shard + 1) * each):
                members[f"{sample:05d}.png"] = b"not a picture" if sample in corrupt else picture(sample)
                members[f"{sample:05d}.txt"] = b"" if sample in empty else f"{name} sample {sample}".encode()
            write_tar(tmp_path / f"{name}-{shard:03d}.tar", members)
        return str(tmp_path / f"{name}-{{000..{shards - 1:03d}}}.tar")

    return make


@pytest.fixture
def csv_config(make_csv: Callable[..., Path]) -> Callable[..., DataConfig]:
    """A configuration for a fresh CSV; keywords override."""

    def make(corrupt: tuple[int, ...] = (), **settings: object) -> DataConfig:
        path = str(make_csv(40, corrupt))
        return DataConfig(**{"data": path, "held_out_pairs": 8, "image_size": 16, "batch_size": 4, **settings})

    return make


@pytest.fixture
def shards_config(make_shards: Callable[..., str]) -> Callable[..., DataConfig]:
    """A configuration for fresh shards; keywords override."""

    def make(corrupt: tuple[int, ...] = (), **settings: object) -> DataConfig:
        source, held_out = make_shards(corrupt=corrupt), make_shards(1, 6, name="test")
        defaults = {"data": source, "held_out": held_out, "samples_per_epoch": 32, "image_size": 16, "batch_size": 4}
        return DataConfig(**{**defaults, **settings})

    return make
