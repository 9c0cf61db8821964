"""What to train on: `DataConfig`, checked in full when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mlip_kernels._arguments import check_choice, check_integer

Form = Literal["openmoji", "csv", "shards"]
OnDamage = Literal["auto", "error", "skip"]


def form_of(name: str, value: object) -> Form:
    """Which kind of source ``value`` is, by its spelling alone."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {type(value).__name__}")
    if value == "openmoji":
        return "openmoji"
    if value.endswith((".csv", ".tsv")):
        return "csv"
    if value.endswith((".tar", ".tar.gz", ".tgz")):
        return "shards"
    raise ValueError(
        f'{name}: expected "openmoji", a path ending in .csv or .tsv, or webdataset shards ending in .tar '
        f'such as "shards-{{000..009}}.tar", got {value!r}'
    )


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from and how they are batched.

    Attributes:
        data: ``"openmoji"``, the path of a CSV with a header row (open_clip's: ``filepath<TAB>title``; paths are
            absolute or relative to the folder of the CSV), or webdataset shards on local disk with braces expanded.
        held_out: a second source in one of the same forms, for evaluation. None splits ``data`` by a hash of each
            image's name, whatever the seed; shards cannot be split and need one.
        held_out_pairs: the largest number of held-out pairs.
        image_size: height and width of the images in pixels.
        context_length: text tokens, start and end of text included; longer captions are cut and keep the end.
        batch_size: pairs per batch and process.
        workers: processes (threads, for shards) that prepare batches beside the training; 0 does without. The
            batches are the same for any number.
        seed: of the order and the augmentation.
        csv_separator, csv_image_key, csv_caption_key: one character, and the names of two columns.
        samples_per_epoch: pairs over all processes that make an epoch. Needed for shards, whose number of pairs is
            unknown; elsewhere None means all, and a smaller number takes that many, drawn anew every epoch.
        on_damage: what becomes of damaged shards. ``"auto"``: an error where the first header or the end mark tells
            before work starts; damage found later is counted and said, and the rest of that shard left out.
            ``"error"`` ends the run at either, ``"skip"`` counts either.
        cache_dir: where drawn emoji are kept; None is ``$XDG_CACHE_HOME/mlip_kernels`` or ``~/.cache/mlip_kernels``.

    Raises:
        TypeError, ValueError: naming the field, what came and what is wanted.
    """

    data: str = "openmoji"
    held_out: str | None = None
    held_out_pairs: int = 256
    image_size: int = 64
    context_length: int = 24
    batch_size: int = 128
    workers: int = 0
    seed: int = 0
    csv_separator: str = "\t"
    csv_image_key: str = "filepath"
    csv_caption_key: str = "title"
    samples_per_epoch: int | None = None
    on_damage: OnDamage = "auto"
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        form = form_of("data", self.data)
        if self.held_out is not None:
            form_of("held_out", self.held_out)
            if self.held_out == self.data:
                raise ValueError(
                    f"held_out: expected another source than data, or None to split it, got {self.held_out!r}"
                )
        elif form == "shards":
            raise ValueError("held_out: expected a source, as webdataset shards cannot be split, got None")
        check_integer("held_out_pairs", self.held_out_pairs, minimum=1)
        check_integer("image_size", self.image_size, minimum=8, maximum=4096)
        check_integer("context_length", self.context_length, minimum=3)
        check_integer("batch_size", self.batch_size, minimum=1)
        check_integer("workers", self.workers, minimum=0)
        check_integer("seed", self.seed, minimum=0)
        for name in ("csv_separator", "csv_image_key", "csv_caption_key"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name}: expected a string, got {type(value).__name__}")
            if not value:
                raise ValueError(f"{name}: expected a string that is not empty, got ''")
        if len(self.csv_separator) != 1 or self.csv_separator in '\r\n"':
            raise ValueError(
                f"csv_separator: expected one character such as a tab or a comma, got {self.csv_separator!r}"
            )
        if self.csv_image_key == self.csv_caption_key:
            raise ValueError(
                f"csv_caption_key: expected another column than csv_image_key, got {self.csv_caption_key!r}"
            )
        if self.samples_per_epoch is not None:
            check_integer("samples_per_epoch", self.samples_per_epoch, minimum=1)
        elif form == "shards":
            raise ValueError("samples_per_epoch: expected an integer, as shards do not tell their length, got None")
        check_choice("on_damage", self.on_damage, get_args(OnDamage))
        if self.cache_dir is not None and not isinstance(self.cache_dir, str):
            raise TypeError(f"cache_dir: expected a string or None, got {type(self.cache_dir).__name__}")
