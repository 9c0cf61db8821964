"""Sources whose pairs are numbered, their split, and their training batches."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mlip_kernels.data.batch import Batch, normalize, tokenize
from mlip_kernels.data.config import DataConfig
from mlip_kernels.data.images import UndecodableError, random_view
from mlip_kernels.data.reading import progress
from mlip_kernels.data.seeds import digest, generator, shuffled


class Pairs(ABC):
    """Numbered image-caption pairs. ``keys[i]`` names the picture of pair i: equal keys mean the same picture."""

    name: str
    keys: Sequence[str]
    captions: Sequence[str]
    empty_captions: int
    corrupt: dict[str, str]
    """Where pictures that could not be decoded come from, and why they could not."""

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """uint8 ``[3, height, width]``.

        Raises:
            UndecodableError: the file cannot be decoded.
            OSError: it cannot be read; names it.
        """

    @abstractmethod
    def describe(self, index: int) -> str:
        """Where pair ``index`` comes from, for messages."""

    def content(self) -> Iterator[bytes]:
        """Keys and captions in their order, for a digest: other bytes for other pairs, the same on every machine."""
        for first in range(0, len(self.keys), 10_000):  # in parts, since there may be millions
            part = slice(first, first + 10_000)
            yield json.dumps([list(self.keys[part]), list(self.captions[part])]).encode()


def plain(caption: str) -> str:
    """``caption`` as the tokenizer tells captions apart: lower case, single spaces."""
    return " ".join(caption.lower().split())


def split(pairs: Pairs, count: int, *, show_progress: bool = False) -> tuple[Tensor, Tensor]:
    """Indices for training and at most ``count`` held-out ones, int64.

    Pictures are put in the order of a hash of their key, so the split depends on nothing else. Of each picture in
    turn the first caption not yet held out is taken, so no two held-out pairs share a picture or a caption; every
    other pair with a held-out picture is left out of training.

    The split is random over pictures. Where a source has many near-copies, as openmoji has for skin tones and
    genders, some of them land on either side: held-out figures then measure recognition of close variants, and a
    split by groups of variants would be stricter.
    """
    rows: dict[str, list[int]] = {}
    for index, key in enumerate(pairs.keys):
        rows.setdefault(key, []).append(index)
    training = torch.ones(len(pairs.keys), dtype=torch.bool)
    held_out: list[int] = []
    captions: set[str] = set()
    hashed = []
    with progress("choosing held-out pairs", len(rows), "picture", show_progress) as bar:
        for key in rows:
            hashed.append((digest("held out", key), key))
            bar.update()
    for _, key in sorted(hashed):
        if len(held_out) == count:
            break
        new = [index for index in rows[key] if plain(pairs.captions[index]) not in captions]
        if new:
            captions.add(plain(pairs.captions[new[0]]))
            held_out.append(new[0])
            training[rows[key]] = False
    return training.nonzero().flatten(), torch.tensor(held_out, dtype=torch.int64)


class View(NamedTuple):
    image: Tensor
    caption: str
    corrupt: dict[int, str]


class Collated(NamedTuple):
    images: Tensor
    text: Tensor
    captions: list[str]
    corrupt: dict[int, str]


class EpochViews(Dataset[View | Exception]):
    """The samples of one epoch by their position in its order.

    A corrupt image is replaced by the sample half an epoch on, or by the first valid one behind that: batches stay
    full and depend on the position alone, and seldom hold a pair twice.
    """

    def __init__(self, pairs: Pairs, order: Tensor, config: DataConfig, epoch: int) -> None:
        self.pairs, self.order, self.config, self.epoch = pairs, order, config, epoch
        self.corrupt: dict[int, str] = {}

    def __getitem__(self, position: int) -> View | Exception:
        try:
            return self._view(position)
        except (OSError, ValueError) as failure:
            return failure  # raised where it arrives: a worker would send its traceback as the message

    def _view(self, position: int) -> View:
        corrupt: dict[int, str] = {}
        for index in self._candidates(position):
            if index not in self.corrupt:
                try:
                    image = self.pairs.image(index)
                except UndecodableError as failure:
                    self.corrupt[index] = str(failure)
                else:
                    source = generator(self.config.seed, self.epoch, index)
                    view = random_view(image, self.config.image_size, source)
                    return View(view, self.pairs.captions[index], corrupt)
            corrupt[index] = self.corrupt[index]
        raise ValueError(f"data: none of the {len(self.order)} training images in {self.pairs.name} can be decoded")

    def _candidates(self, position: int) -> Iterator[int]:
        count = len(self.order)
        yield int(self.order[position])
        for offset in range(count):
            yield int(self.order[(position + count // 2 + offset) % count])

    def collate(self, fetched: Sequence[View | Exception]) -> Collated | Exception:
        views = []
        for view in fetched:
            if isinstance(view, Exception):
                return view
            views.append(view)
        captions = [view.caption for view in views]
        text = tokenize(captions, self.config.context_length)
        corrupt = {index: why for view in views for index, why in view.corrupt.items()}
        return Collated(torch.stack([view.image for view in views]), text, captions, corrupt)


class PairBatches:
    """Training batches from numbered pairs.

    The order of an epoch is drawn from (seed, epoch). Of each run of ``world_size · batch_size`` positions, process
    r takes every ``world_size``-th from the r-th on, so together they see the batch that one process would.
    """

    def __init__(self, pairs: Pairs, training: Tensor, config: DataConfig, rank: int, world_size: int) -> None:
        self.source, self.training, self.config = pairs, training, config
        self.rank, self.world_size = rank, world_size
        self.samples = len(training)
        if config.samples_per_epoch is not None:
            if config.samples_per_epoch > self.samples:
                raise ValueError(
                    f"samples_per_epoch: expected at most the {self.samples} training pairs of {pairs.name}, "
                    f"got {config.samples_per_epoch}"
                )
            self.samples = config.samples_per_epoch
        self.batches_per_epoch = self.samples // (world_size * config.batch_size)

    def count(self) -> str:
        return f"{len(self.training):,} of {len(self.source.keys):,} pairs for training"

    def batches(self, epoch: int, skip: int) -> Iterator[Batch]:
        order = shuffled(self.training, "order", self.config.seed, epoch)[: self.samples]
        views = EpochViews(self.source, order, self.config, epoch)
        step = self.world_size * self.config.batch_size
        positions = [
            range(number * step + self.rank, (number + 1) * step, self.world_size)
            for number in range(skip, self.batches_per_epoch)
        ]
        collated: Iterable[Collated | Exception]
        if self.config.workers:
            collated = DataLoader(
                views,
                batch_sampler=positions,  # type: ignore[arg-type]  # any iterable of index sequences will do
                num_workers=self.config.workers,
                collate_fn=views.collate,
                generator=torch.Generator(),  # or the loader would draw from the global one
            )
        else:
            collated = (views.collate([views[position] for position in part]) for part in positions)
        for batch in collated:
            if isinstance(batch, Exception):
                raise batch
            self.source.corrupt.update((self.source.describe(index), why) for index, why in batch.corrupt.items())
            yield Batch(normalize(batch.images), batch.text, batch.captions)
