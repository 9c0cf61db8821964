"""Pairs in webdataset shards: tar files read from front to back, an image and a ``txt`` per key."""

from __future__ import annotations

import json
import os
import random
import tarfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mlip_kernels.data.batch import Batch, normalize, tokenize
from mlip_kernels.data.config import DataConfig
from mlip_kernels.data.images import decode, random_view
from mlip_kernels.data.packages import require
from mlip_kernels.data.seeds import digest, generator

IMAGE_KEYS = ("jpg", "png", "webp", "jpeg")
SHUFFLE_BUFFER = 1000
PREFETCHED_BATCHES = 2


class Sample(NamedTuple):
    key: str
    image: bytes
    caption: str


class Shards:
    """The tar files that ``pattern`` names, its braces expanded.

    Raises:
        FileNotFoundError, OSError: a shard does not exist or is no tar file; names it.
    """

    def __init__(self, pattern: str) -> None:
        self.name = pattern
        require("webdataset.tariterators")
        try:
            self.paths = sorted(set(require("braceexpand").braceexpand(pattern)))
        except ValueError as failure:
            raise ValueError(f"{pattern}: the braces cannot be expanded: {failure}") from failure
        self._without_caption: set[str] = set()
        self.corrupt: set[str] = set()
        for path in self.paths:
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such shard (of {pattern})")
            try:
                tarfile.open(path).close()
            except (OSError, tarfile.TarError, EOFError, zlib.error) as failure:
                raise OSError(f"{path}: cannot read the shard: {failure}") from failure

    def content(self) -> Iterator[bytes]:
        """Names below the folder that holds all shards, and sizes in bytes, for a digest that a move leaves alone."""
        folder = os.path.commonpath([Path(path).resolve().parent for path in self.paths])
        for path in self.paths:
            yield json.dumps([os.path.relpath(Path(path).resolve(), folder), os.path.getsize(path)]).encode()

    @property
    def empty_captions(self) -> int:
        return len(self._without_caption)

    def samples(self, paths: Sequence[str]) -> Iterator[Sample]:
        """The pairs of ``paths`` in order; those without an image or with an empty caption are counted and skipped."""
        tariterators = require("webdataset.tariterators")
        for path in paths:
            try:
                with open(path, "rb") as stream:
                    files = tariterators.tar_file_expander([{"url": path, "stream": stream}])
                    for sample in tariterators.group_by_keys(files):
                        key = f"{path}: {sample['__key__']}"
                        image = next((sample[k] for k in IMAGE_KEYS if k in sample), None)
                        caption = sample.get("txt", b"").decode("utf-8", errors="replace").strip()
                        if image is None:
                            self.corrupt.add(key)
                        elif not caption:
                            self._without_caption.add(key)
                        else:
                            yield Sample(key, image, caption)
            except (OSError, tarfile.TarError, EOFError, zlib.error, ValueError) as failure:
                raise OSError(f"{path}: cannot read the shard: {failure}") from failure

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
                raise ValueError(f"{self.name}: no key with an image ({', '.join(IMAGE_KEYS)}) and a caption (txt)")


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
        before: list[Sample] = []
        for number in range(self.batches_per_epoch):
            samples = list(islice(stream, self.world_size * self.config.batch_size))
            if number >= skip:
                yield number, before, samples
            before = samples

    def _view(
        self, epoch: int, number: int, place: int, before: list[Sample], samples: list[Sample]
    ) -> tuple[Tensor, str]:
        source = generator(self.config.seed, epoch, number * len(samples) + place)
        for group in ([samples[place]], before[place:] + before[:place], samples[place + 1 :] + samples[:place]):
            for sample in group:
                image = decode(sample.image, self.config.image_size)
                if image is not None:
                    return random_view(image, self.config.image_size, source), sample.caption
                self.source.corrupt.add(sample.key)
        raise ValueError(f"{self.source.name}: none of {len(before) + len(samples)} images in a row can be decoded")

    def _batch(self, views: list[tuple[Tensor, str]]) -> Batch:
        captions = [caption for _, caption in views]
        images = normalize(torch.stack([image for image, _ in views]))
        return Batch(images, tokenize(captions, self.config.context_length), captions)
