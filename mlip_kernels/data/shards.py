"""Pairs in webdataset shards: an image and a ``txt`` per key."""

from __future__ import annotations

import json
import os
import random
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mlip_kernels.data.batch import LONGEST_CAPTION, Batch, normalize, tokenize
from mlip_kernels.data.config import DataConfig, OnDamage
from mlip_kernels.data.images import MAX_BYTES, UndecodableError, load, random_view
from mlip_kernels.data.packages import require
from mlip_kernels.data.patterns import expand
from mlip_kernels.data.reading import notice, progress
from mlip_kernels.data.seeds import digest, generator
from mlip_kernels.data.tars import DamagedShardError, check_ends, members

IMAGE_KEYS = ("jpg", "png", "webp", "jpeg", "gif", "bmp", "tif", "tiff")
CAPTION_KEY = "txt"
WANTED = f"an image ({', '.join(IMAGE_KEYS)}) and a caption ({CAPTION_KEY})"
METADATA = re.compile(r"__[^/]*__($|/)")
MEMBERS_LOOKED_AT = 1000
SHUFFLE_BUFFER = 1000
PREFETCHED_BATCHES = 2


class Sample(NamedTuple):
    key: str
    image: bytes
    caption: str


class Shards:
    """The tar files that ``pattern`` names, its braces expanded.

    ``damaged`` holds the shards of which a part could not be read, and why.

    Raises:
        FileNotFoundError, OSError: a shard does not exist or, unless ``on_damage`` is ``"skip"``, has a damaged first
            header or no end mark; names it.
        ValueError: the braces do not match or make too many names, or no shard has an image and a caption.
    """

    def __init__(self, pattern: str, on_damage: OnDamage = "auto", *, show_progress: bool = True) -> None:
        self.name, self.on_damage, self.show = pattern, on_damage, show_progress
        require("webdataset.tariterators")
        self.paths = expand(pattern)
        self._without_caption: set[str] = set()
        self.corrupt: dict[str, str] = {}
        self.damaged: dict[str, str] = {}
        has_pairs, endings = False, set[str]()
        with progress("checking shards", len(self.paths), "shard", show_progress) as bar:
            for path in self.paths:
                if not Path(path).is_file():
                    raise FileNotFoundError(f"{path}: no such shard (of {pattern})")
                try:
                    check_ends(path)
                    has_pairs = has_pairs or _has_pair(path, endings)
                except DamagedShardError as failure:
                    if on_damage != "skip":
                        raise _with_remedy(failure) from failure
                    self._count(path, failure)
                    has_pairs = True  # or it cannot be told
                bar.update()
        if not has_pairs:
            raise ValueError(f"{pattern}: no key with {WANTED}; its members end in {', '.join(sorted(endings)) or '-'}")

    def content(self) -> Iterator[bytes]:
        """Names below the folder that holds all shards, and sizes in bytes, for a digest that a move leaves alone."""
        folder = os.path.commonpath([Path(path).resolve().parent for path in self.paths])
        for path in self.paths:
            yield json.dumps([os.path.relpath(Path(path).resolve(), folder), os.path.getsize(path)]).encode()

    @property
    def empty_captions(self) -> int:
        return len(self._without_caption)

    def samples(self, paths: Sequence[str]) -> Iterator[Sample]:
        """The pairs of ``paths`` in order.

        Members of one key follow each other, as webdataset has it; a member that comes again begins another sample.
        Samples without an image or with an unusable caption are counted and skipped. A damaged shard is read up to
        the damage.

        Raises:
            DamagedShardError: with ``on_damage="error"``, at the damage.
            OSError: a shard cannot be read; names it.
        """
        key_and_ending = require("webdataset.tariterators").base_plus_ext
        for path in paths:
            key, parts = "", dict[str, bytes | None]()
            try:
                for name, data in members(path, _limit):
                    next_key, ending = key_and_ending(name)
                    if next_key is None or METADATA.match(name):
                        continue
                    ending = ending.lower()
                    if next_key != key or ending in parts:
                        if parts and (sample := self._sample(f"{path}: {key}", parts)):
                            yield sample
                        key, parts = next_key, {}
                    parts[ending] = data
            except DamagedShardError as failure:
                # what is missing of the last sample went with the rest of the shard
                whole = CAPTION_KEY in parts and any(ending in parts for ending in IMAGE_KEYS)
                if whole and (sample := self._sample(f"{path}: {key}", parts)):
                    yield sample
                if self.on_damage == "error":
                    raise _with_remedy(failure) from failure
                self._count(path, failure)
            else:
                if parts and (sample := self._sample(f"{path}: {key}", parts)):
                    yield sample

    def _sample(self, where: str, parts: dict[str, bytes | None]) -> Sample | None:
        ending = next((ending for ending in IMAGE_KEYS if ending in parts), None)
        if ending is None:
            self.corrupt[where] = "no image"
            return None
        image, text = parts[ending], parts.get(CAPTION_KEY, b"")
        if image is None:
            self.corrupt[where] = f"an image of more than {MAX_BYTES:,} bytes"
            return None
        try:
            caption = None if text is None else text.decode().strip()
        except UnicodeDecodeError:
            self.corrupt[where] = "a caption that is not in UTF-8"
            return None
        if caption is None or len(caption) > LONGEST_CAPTION:
            self.corrupt[where] = f"a caption of more than {LONGEST_CAPTION:,} characters"
            return None
        if not caption:
            self._without_caption.add(where)
            return None
        return Sample(where, image, caption)

    def _count(self, path: str, failure: DamagedShardError) -> None:
        if path not in self.damaged:
            self.damaged[path] = str(failure)
            if self.show:
                notice(f"{failure}; its pairs from there on are left out")

    def shuffled(self, seed: int, epoch: int) -> Iterator[Sample]:
        """Pairs without end: pass after pass over the shards in random order, through a shuffle buffer."""
        shuffle = require("webdataset").shuffle
        for number in count():
            source = random.Random(digest("order", seed, epoch, number))
            samples = self.samples(source.sample(self.paths, len(self.paths)))
            empty = True
            for sample in shuffle(SHUFFLE_BUFFER, rng=source)(samples):
                empty = False
                yield sample
            if empty:
                raise ValueError(f"{self.name}: no key with {WANTED}")


def _limit(name: str) -> int:
    """Bytes of a member that are read: nothing of what is neither an image nor a caption."""
    ending = name.rpartition("/")[2].partition(".")[2].lower()
    if ending == CAPTION_KEY:
        return 4 * LONGEST_CAPTION
    return MAX_BYTES if ending in IMAGE_KEYS else 0


def _has_pair(path: str, endings: set[str]) -> bool:
    """Whether a key of the first members has what a pair needs; adds their endings to ``endings``."""
    key, found = "", set[str]()
    for name, _ in islice(members(path, lambda _: 0), MEMBERS_LOOKED_AT):
        next_key, _, ending = name.rpartition("/")[2].lower().partition(".")
        if next_key != key:
            key, found = next_key, set()
        found.add(ending)
        endings.add(f".{ending}")
        if CAPTION_KEY in found and not found.isdisjoint(IMAGE_KEYS):
            return True
    return False


def _with_remedy(failure: DamagedShardError) -> DamagedShardError:
    return DamagedShardError(f'{failure}; on_damage: "skip" goes on without what cannot be read')


class ShardBatches:
    """Training batches from shards.

    The order of an epoch is drawn from (seed, epoch) and is the same in every process. Of each run of
    ``world_size · batch_size`` samples, process r takes every ``world_size``-th from the r-th on, so together they
    see the batch that one process would; the price is that each reads all shards, though it decodes only its part.
    Skipped batches are read and not decoded.

    A corrupt image is replaced by the sample at the same place in the batch over all processes before it, or the
    first valid one behind that, or else of its own batch. With workers, threads decode; reading stays in order.
    """

    def __init__(self, shards: Shards, config: DataConfig, rank: int, world_size: int) -> None:
        assert config.samples_per_epoch is not None
        self.source, self.config, self.rank, self.world_size = shards, config, rank, world_size
        self.samples = config.samples_per_epoch
        self.batches_per_epoch = self.samples // (world_size * config.batch_size)

    def count(self) -> str:
        return f"{len(self.source.paths):,} shards, {self.samples:,} pairs an epoch"

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        if not self.config.workers:
            for number, before, samples in self._groups(epoch, skip):
                places = range(self.rank, len(samples), self.world_size)
                yield self._batch([self._view(epoch, number, place, before, samples) for place in places])
            return
        pool = ThreadPoolExecutor(self.config.workers)
        pending: deque[list[Future[tuple[Tensor, str]]]] = deque()
        try:
            for number, before, samples in self._groups(epoch, skip):
                places = range(self.rank, len(samples), self.world_size)
                pending.append([pool.submit(self._view, epoch, number, place, before, samples) for place in places])
                if len(pending) > PREFETCHED_BATCHES:
                    yield self._batch([future.result() for future in pending.popleft()])
            while pending:
                yield self._batch([future.result() for future in pending.popleft()])
        finally:
            pool.shutdown(cancel_futures=True)

    def _groups(self, epoch: int, skip: int) -> Iterator[tuple[int, list[Sample], list[Sample]]]:
        """From batch ``skip`` on: its number, the samples of the batch before it, and its own, over all processes."""
        stream = self.source.shuffled(self.config.seed, epoch)
        size = self.world_size * self.config.batch_size
        before: list[Sample] = []
        with progress("reading up to where the run stopped", skip, "batch", self.source.show) as bar:
            for _ in range(skip):
                before = list(islice(stream, size))
                bar.update()
        for number in range(skip, self.batches_per_epoch):
            samples = list(islice(stream, size))
            yield number, before, samples
            before = samples

    def _view(
        self, epoch: int, number: int, place: int, before: list[Sample], samples: list[Sample]
    ) -> tuple[Tensor, str]:
        source = generator(self.config.seed, epoch, number * len(samples) + place)
        for group in ([samples[place]], before[place:] + before[:place], samples[place + 1 :] + samples[:place]):
            for sample in group:
                try:
                    image = load(sample.image, self.config.image_size)
                except UndecodableError as failure:
                    self.source.corrupt[sample.key] = str(failure)
                else:
                    return random_view(image, self.config.image_size, source), sample.caption
        raise ValueError(f"{self.source.name}: none of {len(before) + len(samples)} images in a row can be decoded")

    def _batch(self, views: list[tuple[Tensor, str]]) -> Batch:
        captions = [caption for _, caption in views]
        images = normalize(torch.stack([image for image, _ in views]))
        return Batch(images, tokenize(captions, self.config.context_length), captions)
