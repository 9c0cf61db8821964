"""`open_data`: from a configuration to training and held-out batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from mlip_kernels._arguments import check_integer
from mlip_kernels.data import held_out as evaluation
from mlip_kernels.data.batch import Batch
from mlip_kernels.data.config import DataConfig, form_of
from mlip_kernels.data.csv_pairs import CsvPairs
from mlip_kernels.data.held_out import HeldOut, HeldOutRows, HeldOutShards
from mlip_kernels.data.openmoji import OpenMojiPairs, attribution
from mlip_kernels.data.packages import require
from mlip_kernels.data.pairs import PairBatches, Pairs, split
from mlip_kernels.data.shards import ShardBatches, Shards


class ImageTextData:
    """Training and held-out batches of one process; made by `open_data`.

    Attributes:
        batches_per_epoch: full batches per process and epoch; the pairs that fill no batch are left to other epochs.
        attribution: the line to show with the data, where its licence asks for one, else None.
    """

    def __init__(self, config: DataConfig, training: PairBatches | ShardBatches, held_out: HeldOut) -> None:
        self.config = config
        self.batches_per_epoch = training.batches_per_epoch
        self.attribution = attribution() if "openmoji" in (config.data, config.held_out) else None
        self._training, self._held_out = training, held_out

    def train(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from number ``skip`` on: ``batches_per_epoch - skip`` of them.

        Their content depends on the configuration, the process, the epoch and their number alone: neither on
        ``workers`` nor on global random state, which is left untouched. So a resumed run sees the same bits. Order
        and augmentation are drawn anew every epoch. Corrupt images are replaced and counted (`report`).

        Raises:
            ValueError, TypeError: ``epoch`` is negative, ``skip`` not in ``[0, batches_per_epoch]``; while iterating,
                if no image can be decoded.
            OSError: while iterating, if a file cannot be read; names it.
        """
        check_integer("epoch", epoch, minimum=0)
        check_integer("skip", skip, minimum=0, maximum=self.batches_per_epoch)
        return self._training.batches(epoch, skip)

    def held_out(self, batch_size: int) -> Iterator[Batch]:
        """At most ``held_out_pairs`` pairs, always in the same order, in central views without augmentation.

        No caption occurs twice. Every process gets all of them. The last batch may be short. Corrupt images are
        left out and counted.

        Raises:
            ValueError, TypeError: ``batch_size`` is not a positive integer; while iterating, if no pair is valid.
        """
        check_integer("batch_size", batch_size, minimum=1)
        return evaluation.batches(self._held_out, self.config, batch_size)

    def digest(self) -> str:
        """SHA-256 in hexadecimal of what is trained and evaluated on, for a checkpoint to tell other data by.

        Of numbered pairs (openmoji, CSV) it covers the image keys (the paths as the CSV has them) and captions, in
        order, and which pairs are held out; about a second per million pairs. Of shards it covers their names below
        their common folder and their sizes. So it stays the same where a folder is moved as a whole, and for any
        process, seed and batch size. No image is read: a picture replaced under its old name is not noticed.

        Raises:
            OSError: a shard is gone; names it.
        """
        total = hashlib.sha256()
        for source in (self._training.source, self._held_out):
            for part in source.content():
                total.update(len(part).to_bytes(8, "little") + part)
            total.update(bytes(8))  # a part of no bytes: what follows is of the other source
        return total.hexdigest()

    def report(self) -> str:
        """A few lines: pairs, held-out pairs, what this process skipped so far, the attribution."""
        config = self.config
        sources = {id(source): source for source in (self._training.source, self._held_out.source)}.values()
        corrupt = {where: why for source in sources for where, why in source.corrupt.items()}
        shards = [source for source in sources if isinstance(source, Shards)]
        damaged = [why for source in shards for why in source.damaged.values()]
        lines = [
            f"{config.data}: {self._training.count()}, "
            f"{self.batches_per_epoch:,} batches of {config.batch_size} per process and epoch",
            f"held out: {self._held_out.count()} of {self._held_out.source.name}",
            f"skipped so far: {len(corrupt):,} corrupt images, "
            f"{sum(source.empty_captions for source in sources):,} empty captions"
            + (f", the ends of {len(damaged):,} damaged shards" if shards else ""),
            *(f"  corrupt: {where}: {why}" for where, why in sorted(corrupt.items())[:10]),
            *(f"  damaged: {why}" for why in sorted(damaged)[:10]),
        ]
        if self.attribution:
            lines.append(self.attribution)
        return "\n".join(lines)


def open_data(config: DataConfig, rank: int = 0, world_size: int = 1) -> ImageTextData:
    """Open the data that ``config`` names, for process ``rank`` of ``world_size``.

    Every file is looked for and every CSV read before this returns; the first use of ``"openmoji"`` at an image size
    draws the pictures, a few seconds. Process 0 shows the progress of what takes longer than a second on standard
    error. Batch k of all processes together holds the pairs, augmented alike, that a single process with
    ``world_size`` times the batch size sees as its batch k.

    Raises:
        ImportError: a package of the ``[train]`` extra is absent; names it and the remedy.
        FileNotFoundError, OSError: a file is missing or unreadable; names it.
        TypeError, ValueError: a wrong argument, a fault of the CSV, shards without captions, too few pairs for one
            batch.
    """
    if not isinstance(config, DataConfig):
        raise TypeError(f"config: expected a DataConfig, got {type(config).__name__}")
    check_integer("world_size", world_size, minimum=1)
    check_integer("rank", rank, minimum=0, maximum=world_size - 1)
    for module in ("numpy", "PIL.Image", "open_clip.tokenizer"):
        require(module)
    leads = rank == 0
    source = _open(config, config.data, show_progress=leads)
    other = source if config.held_out is None else _open(config, config.held_out, show_progress=leads)
    training: PairBatches | ShardBatches
    held_out: HeldOut
    rows = None
    if isinstance(other, Shards):
        held_out = HeldOutShards(other, config)
    else:
        others, chosen = split(other, config.held_out_pairs, show_progress=leads)
        held_out = HeldOutRows(other, chosen)
        rows = others if other is source else None
    if isinstance(source, Shards):
        if isinstance(other, Shards) and (shared := set(source.paths) & set(other.paths)):
            raise ValueError(f"held_out: expected other shards than data, got {min(shared)} in both")
        training = ShardBatches(source, config, rank, world_size)
    else:
        if rows is None:
            rows = torch.arange(len(source.keys))
        needed = world_size * config.batch_size
        if len(rows) < needed < len(source.keys):
            raise ValueError(
                f"held_out_pairs: expected a number that leaves a batch of {needed} of the {len(source.keys):,} pairs "
                f"of {config.data} for training, got {config.held_out_pairs}, which leaves {len(rows):,}"
            )
        training = PairBatches(source, rows, config, rank, world_size)
    if not training.batches_per_epoch:
        raise ValueError(
            f"batch_size: expected at most the {training.samples} training pairs of an epoch of {config.data} "
            f"({held_out.count()} held out), got {config.batch_size} on {world_size} processes"
        )
    return ImageTextData(config, training, held_out)


def _open(config: DataConfig, source: str, *, show_progress: bool) -> Pairs | Shards:
    form = form_of("data", source)
    if form == "openmoji":
        return OpenMojiPairs(config, show_progress=show_progress)
    if form == "csv":
        return CsvPairs(source, config, show_progress=show_progress)
    return Shards(source, config.on_damage, show_progress=show_progress)
