"""Options of ``open_clip_train`` on the command line of this trainer: taken under our names, or answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

RENAMED = {
    "accum-freq": "accumulate",
    "csv-img-key": "csv-image-key",
    "eps": "epsilon",
    "grad-checkpointing": "gradient-checkpointing",
    "grad-clip-norm": "clip-gradients",
    "imagenet-val": "zeroshot",
    "log-every-n-steps": "log-every",
    "logs": "output",
    "lr": "learning-rate",
    "train-data": "data",
    "train-num-samples": "samples-per-epoch",
    "val-data": "held-out",
    "warmup": "warmup-steps",
    "wd": "weight-decay",
}
"""Options that take the same values."""

VALUES = {
    ("precision", "amp"): ["--precision", "auto"],
    ("precision", "amp_bf16"): ["--precision", "bfloat16"],
    ("precision", "amp_bfloat16"): ["--precision", "bfloat16"],
    ("precision", "fp32"): ["--precision", "float32"],
    ("report-to", "all"): ["--report-to", "wandb"],
    ("report-to", "tensorboard"): [],
    ("report-to", "tensorboard,wandb"): ["--report-to", "wandb"],
    ("report-to", "wandb,tensorboard"): ["--report-to", "wandb"],
    ("resume", "latest"): ["--resume"],
    ("lr-scheduler", "cosine"): [],
    ("dataset-type", "auto"): [],
    ("dataset-type", "csv"): [],
    ("dataset-type", "webdataset"): [],
}
"""Values that are written otherwise, or that say what is so anyway."""

IMPLIED = {"local-loss", "gather-with-grad", "ddp-static-graph"}
"""Switches for what this trainer does or has no need of."""

ANSWERS = {
    "model": "--preset and --model.image.…, or --pretrained for its weights",
    "name": "--output, the folder of the run",
    "save-frequency": "--checkpoint-every, in steps",
    "val-frequency": "--evaluate-every, in steps",
    "zeroshot-frequency": "--evaluate-every, in steps",
    "delete-previous-checkpoint": "--keep-checkpoints 1",
    "siglip": "the loss of CLIP; mlip_kernels.integrations.open_clip trains SigLIP's with open_clip's own script",
    "force-image-size": "--model.image.image-size",
    "force-quick-gelu": "--model.image.activation quick_gelu --model.text.activation quick_gelu",
    "beta1": "--betas BETA1 BETA2",
    "beta2": "--betas BETA1 BETA2",
    "lr-scheduler": "a cosine",
    "epochs-cooldown": "a cosine without a cooldown",
    "skip-scheduler": "a cosine; --warmup-steps 0 leaves the warm-up out",
    "dataset-type": "the ending of --data that says it",
    "pretrained-image": "--pretrained timm/NAME",
    "lock-text-freeze-layer-norm": "--lock-text, which leaves the norms as they are too",
    "lock-image-freeze-bn-stats": "a tower without batch norm",
    "dist-backend": "nccl on GPUs and gloo on CPUs",
    "dist-url": "what torchrun sets",
    "wandb-notes": "--report-to wandb with WANDB_NOTES in the environment",
}
"""Options that have no counterpart under another name, and what stands for them."""


def translated(arguments: Iterable[str]) -> list[str]:
    """``arguments`` with options of ``open_clip_train`` under the names of this trainer.

    Raises:
        ValueError: naming an option that is not taken, and what stands for it here.
    """
    return list(_translated(list(arguments)))


def _translated(arguments: list[str]) -> Iterator[str]:
    while arguments:
        argument = arguments.pop(0)
        written, equals, value = argument.partition("=")
        option = written.removeprefix("--").replace("_", "-")
        if not written.startswith("--"):
            yield argument
            continue
        if not equals and arguments and not arguments[0].startswith("--"):
            value = arguments[0]
        if (option, value) in VALUES:
            del arguments[: 0 if equals else 1]
            yield from VALUES[option, value]
        elif option == "resume" and value and value not in ("True", "False"):
            yield "--resume-from" + equals + (value if equals else "")
        elif option in IMPLIED:
            continue
        elif option in ANSWERS:
            raise ValueError(f"{written}: an option of open_clip_train; here it is {ANSWERS[option]}")
        elif option in RENAMED:
            yield f"--{RENAMED[option]}{equals}{value if equals else ''}"
        else:
            yield argument
