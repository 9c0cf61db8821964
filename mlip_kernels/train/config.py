"""Configuration of a training run; every field is a command-line option of ``mlip-train``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from mlip_kernels._arguments import check_choice, check_integer, check_number
from mlip_kernels.data import DataConfig
from mlip_kernels.data.config import OnDamage
from mlip_kernels.models.config import (
    FrequencyConfig,
    ImageConfig,
    LossConfig,
    MergingConfig,
    MLIPConfig,
    TextConfig,
)
from mlip_kernels.train.precision import CHOICES

SMALL = MLIPConfig(
    image=ImageConfig(image_size=64, patch_size=8, width=192, depth=6, heads=3),
    text=TextConfig(context_length=24, width=192, depth=3, heads=3),
    frequency=FrequencyConfig(depth=1, mlp_ratio=2.0),
    merging=MergingConfig(keep_rate=0.7),
    loss=LossConfig(token_dim=128),
    embed_dim=192,
)
"""A model that two CPU cores train in minutes on 64-pixel images."""


CLIP_TOWER: dict[str, Any] = {"pre_norm": True, "norm_epsilon": 1e-5}
"""What distinguishes CLIP's own image tower from timm's."""
_UNLOCKED = {"lock_image_unlocked_groups": "lock_image", "lock_text_unlocked_layers": "lock_text"}


@dataclass(frozen=True)
class TrainConfig:
    """One run of the trainer."""

    model: MLIPConfig = field(default_factory=lambda: SMALL)
    """The model and its loss terms."""

    data: str = "openmoji"
    """``openmoji``, a CSV file as open_clip's (``filepath<TAB>title``), or webdataset shards such as
    ``"shards-{000..009}.tar"``."""
    held_out: str | None = None
    """Pairs to evaluate on, in the same forms; by default a fixed part of the training data is set aside."""
    held_out_pairs: int = 256
    """Pairs to evaluate on, at most; each caption is sought among that many images, and the reverse."""
    samples_per_epoch: int | None = None
    """Pairs of an epoch over all processes, for webdataset, whose shards do not say."""
    batch_size: int = 128
    """Pairs per process and micro-batch; the negatives of a pair are the other pairs of all processes."""
    workers: int = 0
    """Processes that prepare data."""
    on_damage: OnDamage = "auto"
    """What becomes of damaged shards: ``auto`` refuses those that show it before work starts and leaves out what
    cannot be read of others, with a line for each; ``error`` ends the run at either, ``skip`` leaves out either."""
    cache_dir: str | None = None
    """Where prepared images are kept; by default the user's cache folder."""
    csv_separator: str = "\t"
    """Column separator of a CSV file."""
    csv_image_key: str = "filepath"
    """Column of the image paths."""
    csv_caption_key: str = "title"
    """Column of the captions."""

    output: str = "runs/openmoji"
    """Folder for logs, checkpoints and the report."""
    resume: bool = False
    """Continue from the newest checkpoint in ``output``, bit for bit; start at step 0 where there is none."""
    resume_from: str | None = None
    """Continue from this checkpoint instead; newer ones of the run are renamed, so that they are out of the way."""
    allow_other: tuple[Literal["data", "world_size"], ...] = ()
    """What may differ from the resumed run: the pairs, or the number of processes where its product with
    ``batch_size`` stays. Otherwise this is refused, as the run would go on with other numbers."""
    overwrite: bool = False
    """Remove an earlier run in ``output`` instead of refusing to start."""

    pretrained: str | None = None
    """What the towers start from: a folder that ``MLIP.save_pretrained``, open_clip or timm wrote, a file of weights in
    open_clip's form, an open_clip model with tag or file (``ViT-B-32:laion2b_s34b_b79k``), or a timm model, with a file
    or not (``timm/vit_base_patch16_224``). The model of the run has to have the same towers."""
    lock_image: bool = False
    """Leave the image tower and its projection as they are."""
    lock_image_unlocked_groups: int = 0
    """Groups of a locked image tower to train all the same, from the end: the projection, the last block with the norm,
    the other blocks, the embedding."""
    lock_text: bool = False
    """Leave the text tower as it is."""
    lock_text_unlocked_layers: int = 0
    """Groups of a locked text tower to train all the same, counted alike."""

    steps: int = 450
    """Optimiser steps."""
    epochs: int = 0
    """Passes over the training pairs, in place of ``steps``; 0 leaves it to them."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; it rises linearly, then falls to 0 along a cosine."""
    warmup_steps: int = 40
    """Steps over which the learning rate rises."""
    weight_decay: float = 0.1
    """Of matrices; biases, norms and logit scales have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Moments of AdamW."""
    epsilon: float = 1e-6
    """Added to the second moment's root."""
    clip_gradients: float = 1.0
    """Largest norm of the gradient; 0 leaves it alone."""
    accumulate: int = 1
    """Micro-batches of one optimiser step. Together they are one contrastive batch, so negatives grow with them; it
    takes the memory of one micro-batch, and every pair but those of the last one is encoded twice."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Autocast dtype of the towers; parameters and losses stay float32. ``auto`` is bfloat16 where the hardware has
    it (GPUs since Ampere, processors with AVX-512-BF16 or AMX), else float32."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass instead of keeping their activations."""
    torchcompile: bool = False
    """Compile the towers by ``torch.compile``. Numbers are then rounded otherwise, and while the keep rate warms up,
    each new count of tokens is compiled anew."""
    gather: Literal["all", "ring"] = "all"
    """How caption tokens travel between processes: all at once, or from one to the next, in less memory."""
    fsdp: bool = False
    """Shard the blocks of the towers, their gradients and their moments over the processes, in less memory of each;
    sums are rounded otherwise. A checkpoint continues with or without."""
    operators: Literal["fused", "reference"] = "fused"
    """Compiled kernels where they are installed, or the plain-PyTorch reference everywhere."""
    device: str = "auto"
    """``auto``, ``cpu`` or ``cuda``."""
    seed: int = 0
    """Of the parameters, the order of the data, its augmentation and everything random in a step."""

    log_every: int = 10
    """Steps between rows of the logs."""
    evaluate_every: int = 0
    """Steps between evaluations; 0 evaluates before and after training only."""
    zeroshot: str | None = None
    """Folder with a folder of pictures for each class, as ImageNet's ``val``: whenever retrieval is evaluated, they are
    classified by the names of their classes in open_clip's templates. Names are those of the folders, unless
    ``classnames.json`` in it maps folders to names; the 1,000 of ImageNet are known."""
    report_to: tuple[Literal["wandb"], ...] = ()
    """Where scalars go beside ``metrics.csv`` and TensorBoard; ``wandb`` is a package of its own."""
    wandb_project_name: str = "mlip"
    """Project of Weights & Biases."""
    checkpoint_every: int = 100
    """Steps between checkpoints; an interrupted run loses at most these."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints", "held_out_pairs"):
            check_integer(name, getattr(self, name), minimum=1)
        for name in ("steps", "epochs", "warmup_steps", "evaluate_every", "workers", "seed", *_UNLOCKED):
            check_integer(name, getattr(self, name), minimum=0)
        for name, lock in _UNLOCKED.items():
            if getattr(self, name) and not getattr(self, lock):
                raise ValueError(
                    f"{name}: expected 0 without {lock}, as all is trained then, got {getattr(self, name)}"
                )
        for name in ("learning_rate", "weight_decay", "clip_gradients", "epsilon"):
            check_number(name, getattr(self, name), minimum=0.0)
        for beta in self.betas:
            check_number("betas", beta, minimum=0.0, maximum=1.0)
        check_choice("precision", self.precision, CHOICES)
        check_choice("gather", self.gather, ("all", "ring"))
        check_choice("operators", self.operators, ("fused", "reference"))
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        for difference in self.allow_other:
            check_choice("allow_other", difference, ("data", "world_size"))
        for target in self.report_to:
            check_choice("report_to", target, ("wandb",))
        if self.fsdp and self.torchcompile:
            raise ValueError("fsdp: expected False together with torchcompile, got True")
        if self.overwrite and (self.resume or self.resume_from is not None):
            raise ValueError("overwrite: expected False together with resume or resume_from, got True")
        self.data_config()

    def data_config(self) -> DataConfig:
        """What the data pipeline needs of this configuration."""
        return DataConfig(
            data=self.data,
            held_out=self.held_out,
            held_out_pairs=self.held_out_pairs,
            image_size=self.model.image.image_size,
            context_length=self.model.text.context_length,
            batch_size=self.batch_size,
            workers=self.workers,
            seed=self.seed,
            csv_separator=self.csv_separator,
            csv_image_key=self.csv_image_key,
            csv_caption_key=self.csv_caption_key,
            samples_per_epoch=self.samples_per_epoch,
            on_damage=self.on_damage,
            cache_dir=self.cache_dir,
        )

    def in_steps(self, batches_per_epoch: int) -> TrainConfig:
        """The configuration with `epochs` as `steps`, for so many micro-batches of a process in an epoch."""
        if not self.epochs:
            return self
        steps = self.epochs * batches_per_epoch // self.accumulate
        if not steps:
            raise ValueError(
                f"epochs: expected at least accumulate={self.accumulate} micro-batches, got {self.epochs} epochs of "
                f"{batches_per_epoch}"
            )
        return dataclasses.replace(self, steps=steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, for a checkpoint."""
        return dataclasses.asdict(self)


PRESETS = {
    "small": TrainConfig(),
    "vit-b-32": TrainConfig(
        model=MLIPConfig(image=ImageConfig(patch_size=32)),
        output="runs/vit-b-32",
        batch_size=128,
        steps=128_000,
        warmup_steps=2_500,
        workers=4,
        checkpoint_every=1_000,
        evaluate_every=5_000,
    ),
    "vit-b-16": TrainConfig(
        model=MLIPConfig(),
        output="runs/vit-b-16",
        batch_size=64,
        steps=128_000,
        learning_rate=5e-4,
        warmup_steps=2_500,
        workers=4,
        gradient_checkpointing=True,
        checkpoint_every=1_000,
        evaluate_every=5_000,
    ),
    "finetune-vit-b-32": TrainConfig(
        model=MLIPConfig(image=ImageConfig(patch_size=32, **CLIP_TOWER)),
        output="runs/finetune-vit-b-32",
        batch_size=128,
        steps=10_000,
        learning_rate=1e-5,
        warmup_steps=500,
        workers=4,
        checkpoint_every=1_000,
        evaluate_every=1_000,
    ),
    "finetune-vit-b-16": TrainConfig(
        model=MLIPConfig(image=ImageConfig(**CLIP_TOWER)),
        output="runs/finetune-vit-b-16",
        batch_size=64,
        steps=10_000,
        learning_rate=1e-5,
        warmup_steps=500,
        workers=4,
        gradient_checkpointing=True,
        checkpoint_every=1_000,
        evaluate_every=1_000,
    ),
}
"""Named starting points; single options change them. Those of ``finetune`` have the towers of LAION's models and want
``pretrained``; OpenAI's have ``activation="quick_gelu"`` in both towers."""
