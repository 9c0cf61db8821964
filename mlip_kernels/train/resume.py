"""What a run continues from, and what may differ from the run that saved it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mlip_kernels.models import MLIPConfig
from mlip_kernels.train import checkpoint
from mlip_kernels.train.config import TrainConfig

WITHOUT_EFFECT = {
    "allow_other",
    "cache_dir",
    "checkpoint_every",
    "device",
    "epochs",
    "evaluate_every",
    "keep_checkpoints",
    "log_every",
    "output",
    "overwrite",
    "precision",
    "report_to",
    "resume",
    "resume_from",
    "wandb_project_name",
    "workers",
    "zeroshot",
}
"""Options that do not change what is computed, or that `Circumstances` or ``steps`` tell more of."""

TAKEN = {
    "betas",
    "clip_gradients",
    "epsilon",
    "fsdp",
    "gather",
    "gradient_checkpointing",
    "learning_rate",
    "on_damage",
    "operators",
    "steps",
    "torchcompile",
    "warmup_steps",
    "weight_decay",
}
"""Options that change what is computed, and that a resumed run may give anew; this is said and recorded."""

OF_THE_DATA = {"csv_caption_key", "csv_image_key", "csv_separator", "data", "held_out", "held_out_pairs"}
"""Options that say where the pairs are; they may differ where the pairs do not."""


MODEL = "model"
"""Folder in the output of a run that holds the model of its end, for `MLIP.from_pretrained`."""


class Circumstances(NamedTuple):
    """What decides the numbers of a run beside its options."""

    data: str
    """Digest of the pairs."""
    world_size: int
    precision: str
    device: str
    threads: int
    """Of one process, on the CPU; sums are rounded otherwise with another number."""
    torch: str
    """Version."""


class Resumed(NamedTuple):
    """A checkpoint to continue from."""

    path: Path
    state: dict[str, Any]
    changes: list[str]
    """What changes the numbers from here on, one phrase each."""


def find(config: TrainConfig) -> Path | None:
    """The checkpoint that ``config`` asks to continue from, or None to begin.

    Raises:
        ValueError: if there is a run that would be mixed with another one.
        FileNotFoundError: if the checkpoint that was asked for is not there.
    """
    folder = Path(config.output)
    found = checkpoint.checkpoints(folder / "checkpoints")
    if config.resume_from is not None:
        path = Path(config.resume_from)
        checkpoint.step_of(path)
        if not path.exists():
            there = f"; {folder} has {', '.join(other.name for other in found)}" if found else ""
            raise FileNotFoundError(f"resume_from: no such checkpoint: {path}{there}")
        if found and path.resolve() not in [other.resolve() for other in found]:
            raise ValueError(f"resume_from: {folder} holds another run ({found[-1].name}), got {path}")
        return path
    if config.resume:
        return found[-1] if found else None
    if found and not config.overwrite:
        raise ValueError(
            f"output: {folder} holds a run ({found[-1].name}); pass --resume to continue it, --overwrite to "
            "replace it, or another --output"
        )
    return None


def load(path: Path, config: TrainConfig, now: Circumstances) -> Resumed:
    """Read the checkpoint at ``path`` and compare its run with this one.

    Raises:
        OSError: if the file cannot be read; names it.
        ValueError: if it is damaged, or of a run that this one cannot continue; names it.
    """
    try:
        state = checkpoint.load(path)
        _check_form(path, state)
    except ValueError as failure:
        older = [other for other in checkpoint.checkpoints(path.parent) if other.name < path.name]
        offer = f"; --resume-from {older[-1]} continues from the one before" if older else "; there is no older one"
        raise ValueError(f"{failure}{offer}") from failure
    saved = {**dataclasses.asdict(TrainConfig()), **state["config"]}
    was, options = Circumstances(**state["circumstances"]), config.to_dict()
    told = {
        name: _change(name, saved[name], options[name])
        for name in options
        if name != "model" and _plain(saved[name]) != _plain(options[name])
    }
    changes = [told[name] for name in told if name in TAKEN]
    of_the_data = [told[name] for name in told if name in OF_THE_DATA]
    refused = []

    if was.data == now.data:
        changes += [f"{change} (the same pairs)" for change in of_the_data]
    elif "data" in config.allow_other:
        changes += [*of_the_data, "other pairs than before"]
    else:
        refused.append(", ".join([*of_the_data, "other pairs than before (--allow-other data goes on with them)"]))

    known = {*WITHOUT_EFFECT, *TAKEN, *OF_THE_DATA}
    if was.world_size != now.world_size:
        known.add("batch_size")
        change = _change("world_size", was.world_size, now.world_size)
        before, after = was.world_size * saved["batch_size"], now.world_size * config.batch_size
        if before != after:
            refused.append(f"{change}: world_size × batch_size was {before}, now {after}")
        elif "world_size" not in config.allow_other:
            refused.append(f"{change} (--allow-other world_size goes on with it, though not bit for bit)")
        else:
            changes.append(change)

    refused += [told[name] for name in told if name not in known]
    model = MLIPConfig.from_dict(saved["model"]).to_dict()
    refused += _differences("model", model, options["model"])
    if refused:
        raise ValueError(f"resume: {path} was made with other options: {'; '.join(refused)}")
    if config.steps < state["step"]:
        raise ValueError(f"steps: expected at least {state['step']}, those of {path}, got {config.steps}")
    changes += [
        _change(name, getattr(was, name), getattr(now, name))
        for name in ("precision", "device", "threads", "torch")
        if getattr(was, name) != getattr(now, name)
    ]
    return Resumed(path, state, changes)


def clear_the_way(config: TrainConfig, resumed: Resumed | None) -> list[str]:
    """Remove the run that is to be overwritten, and rename checkpoints newer than the one to continue from.

    Returns:
        What was done, one sentence each.
    """
    folder = Path(config.output)
    if resumed is not None:
        aside = checkpoint.set_aside(folder / "checkpoints", resumed.state["step"])
        return [f"renamed a newer checkpoint to {path}" for path in aside]
    if config.overwrite:
        for part in ("checkpoints", "tensorboard", MODEL):
            if (folder / part).exists():
                shutil.rmtree(folder / part)
        (folder / "metrics.csv").unlink(missing_ok=True)
    return []


FORM = {
    "step": int,
    "model": dict,
    "optimizer": dict,
    "before": dict,
    "config": dict,
    "circumstances": dict,
    "history": list,
}
"""What a checkpoint of the trainer holds."""


def _check_form(path: Path, state: dict[str, Any]) -> None:
    for name, kind in FORM.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{path}: not a checkpoint of this trainer: expected a {kind.__name__} under {name!r}")
    missing = [name for name in Circumstances._fields if name not in state["circumstances"]]
    missing += [name for name in ("model", "batch_size") if name not in state["config"]]
    if missing or len(state["circumstances"]) != len(Circumstances._fields):
        raise ValueError(f"{path}: not a checkpoint of this version: {', '.join(missing) or 'too much'} of its run")
    try:
        MLIPConfig.from_dict(state["config"]["model"])
    except (TypeError, ValueError, KeyError, AttributeError) as failure:
        raise ValueError(f"{path}: not a checkpoint of this version: its model: {failure}") from failure


def _change(name: str, saved: object, now: object) -> str:
    return f"{name} was {saved!r}, now {now!r}"


def _plain(value: Any) -> Any:
    """Lists for tuples, also nested."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _differences(name: str, saved: Any, now: Any) -> Iterator[str]:
    """Where two nested configurations differ."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in now:
            yield from _differences(f"{name}.{key}", saved.get(key), now[key])
    elif _plain(saved) != _plain(now):
        yield _change(name, saved, now)
