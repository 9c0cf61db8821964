"""Held-out pairs in a fixed order, and their batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from mlip_kernels.data.batch import Batch, normalize, tokenize
from mlip_kernels.data.config import DataConfig
from mlip_kernels.data.images import UndecodableError, central_view, load
from mlip_kernels.data.pairs import Pairs, plain
from mlip_kernels.data.shards import Shards


class HeldOut(Protocol):
    """Pairs to evaluate on; no caption occurs twice."""

    @property
    def source(self) -> Pairs | Shards: ...

    def __iter__(self) -> Iterator[tuple[str, Callable[[], Tensor], str]]:
        """For each pair where it comes from, what decodes its image, and its caption."""

    def count(self) -> str:
        """How many pairs there are, as far as is known."""

    def content(self) -> Iterator[bytes]:
        """What is evaluated on, for a digest."""


class HeldOutRows:
    """Chosen rows of numbered pairs."""

    def __init__(self, pairs: Pairs, rows: Tensor) -> None:
        self.source, self.rows = pairs, rows

    def __iter__(self) -> Iterator[tuple[str, Callable[[], Tensor], str]]:
        for row in self.rows.tolist():
            yield self.source.describe(row), partial(self.source.image, row), self.source.captions[row]

    def count(self) -> str:
        return f"{len(self.rows):,} pairs"

    def content(self) -> Iterator[bytes]:
        for row in self.rows.tolist():
            yield json.dumps([self.source.keys[row], self.source.captions[row]]).encode()


class HeldOutShards:
    """Shards from the front, a caption that came before left out."""

    def __init__(self, shards: Shards, config: DataConfig) -> None:
        self.source, self.config = shards, config

    def __iter__(self) -> Iterator[tuple[str, Callable[[], Tensor], str]]:
        seen: set[str] = set()
        for sample in self.source.samples(self.source.paths):
            if plain(sample.caption) not in seen:
                seen.add(plain(sample.caption))
                yield sample.key, partial(load, sample.image, self.config.image_size), sample.caption

    def count(self) -> str:
        return f"at most {self.config.held_out_pairs:,} pairs"

    def content(self) -> Iterator[bytes]:
        yield from self.source.content()
        yield json.dumps(self.config.held_out_pairs).encode()


def batches(held_out: HeldOut, config: DataConfig, batch_size: int) -> Iterator[Batch]:
    """Central views of the first ``config.held_out_pairs`` valid pairs; the last batch may be short."""

    def views() -> Iterator[tuple[Tensor, str]]:
        for where, decoded, caption in held_out:
            try:
                image = decoded()
            except UndecodableError as failure:
                held_out.source.corrupt[where] = str(failure)
            else:
                yield central_view(image, config.image_size), caption

    valid = islice(views(), config.held_out_pairs)
    empty = True
    while rows := list(islice(valid, batch_size)):
        empty = False
        captions = [caption for _, caption in rows]
        images = normalize(torch.stack([image for image, _ in rows]))
        yield Batch(images, tokenize(captions, config.context_length), captions)
    if empty:
        raise ValueError(f"held_out: no valid pair in {held_out.source.name}")
