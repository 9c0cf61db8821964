"""What a run starts from: the towers of an `MLIP`, of a model of open_clip or of timm, from a name or a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import timm
import torch
from open_clip.factory import load_state_dict
from timm.data import resolve_model_data_config
from torch import Tensor

from mlip_kernels.data.batch import CLIP_MEAN, CLIP_STD
from mlip_kernels.models import MLIP, ImageConfig, TextConfig, from_open_clip
from mlip_kernels.models.export import read as read_mlip
from mlip_kernels.models.folder import is_pretrained
from mlip_kernels.models.open_clip_names import BIAS, POSITIONS, TRUNK, ours
from mlip_kernels.models.timm_trunk import image_config, trunk_state

PATCHES = TRUNK + "patch_embed.proj.weight"
FORMS = (
    "a folder that MLIP.save_pretrained, open_clip or timm wrote, a file of weights in open_clip's form, an open_clip "
    "model with tag or file such as ViT-B-32:laion2b_s34b_b79k, or a timm model such as timm/vit_base_patch16_224"
)


class Source(NamedTuple):
    """What there is to start from."""

    state: dict[str, Tensor]
    """Parameters under the names of an `MLIP`."""
    image: ImageConfig | None = None
    """The image tower that they are of, where the source says."""
    text: TextConfig | None = None
    """The text tower, alike."""
    mean: tuple[float, ...] = CLIP_MEAN
    """Of the pictures that the image tower has seen."""
    std: tuple[float, ...] = CLIP_STD
    """Their deviation."""


def start_from(name: str, model: MLIP) -> str:
    """Copy what ``name`` stands for into ``model``, which is on the CPU; what the source has not stays as it is.

    Weights for pictures with another mean and deviation than CLIP's, which the trainer's have, are changed so that the
    same pictures give the same features.

    Returns:
        What was done, for the user.

    Raises:
        ValueError: if there is no such thing, or its towers are not those of ``model``; names options that help.
        OSError: if a file cannot be read, or a download fails.
    """
    try:
        source = find(name)
    except (RuntimeError, TypeError, ValueError) as failure:
        raise ValueError(f"pretrained: {' '.join(str(failure).split())}") from failure
    _check_towers(name, source, model)
    state = _for_clip_pictures(source, bias=not model.config.image.pre_norm)
    there = model.state_dict()
    towers = [tower for tower in (TRUNK, "text.") if any(key.startswith(tower) for key in state)]
    faults = [f"no {key}" for key in there if key.startswith(tuple(towers)) and key not in state]
    faults += [f"an unknown {key}" for key in state if key.startswith(tuple(towers)) and key not in there]
    taken = {key: value for key, value in state.items() if key in there}
    faults += [
        f"{key} of shape {list(value.shape)} for {list(there[key].shape)}"
        for key, value in taken.items()
        if value.shape != there[key].shape
    ]
    if faults or not towers:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(
            f"pretrained: {name} does not fit the model: {', '.join(faults[:3]) or 'it holds no tower'}{more}"
        )
    model.load_state_dict({**there, **taken})
    new = dict.fromkeys(key.partition(".")[0] for key in there if key not in taken)
    return f"starting from {name}" + (f"; drawn at random: {', '.join(new)}" if new else "")


def find(name: str) -> Source:
    """The weights that ``name`` stands for; see `start_from`."""
    path = Path(name)
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        if path.name.startswith("step-"):
            return _of_mlip(read_mlip(path))
        return Source(ours(dict(load_state_dict(str(path))), patch_bias=False))
    architecture, _, weights = name.partition(":")
    theirs = architecture.replace("/", "-")  # ViT-B/32 is ViT-B-32 to open_clip, too
    if theirs in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(theirs)
        if weights not in tags and not Path(weights).is_file():
            known = ", ".join(tags) or "it has no tags"
            raise ValueError(f"{name}: expected {theirs}:FILE or {theirs}:TAG ({known})")
        return _of_open_clip(open_clip.create_model(theirs, pretrained=weights, require_pretrained=True))
    architecture = architecture.removeprefix("timm/")
    if timm.is_model(architecture):
        return _of_timm(architecture, pretrained_cfg_overlay={"file": weights} if weights else None)
    raise ValueError(f"expected {FORMS}, got {name!r}")


def _of_folder(folder: Path) -> Source:
    if (folder / "open_clip_config.json").is_file():
        return _of_open_clip(open_clip.create_model(f"local-dir:{folder}", require_pretrained=True))
    config = folder / "config.json"
    if config.is_file() and "architecture" in json.loads(config.read_text(encoding="utf-8")):
        return _of_timm(f"local-dir:{folder}")
    if is_pretrained(folder) or is_pretrained(folder / "model"):
        return _of_mlip(read_mlip(folder))
    raise ValueError(f"expected {FORMS}, got the folder {folder}, which holds none of them")


def _of_mlip(model: MLIP) -> Source:
    config, pictures = model.config, model.preprocessing
    return Source(model.state_dict(), config.image, config.text, pictures.mean, pictures.std)


def _of_open_clip(model: torch.nn.Module) -> Source:
    return _of_mlip(from_open_clip(model))


def _of_timm(name: str, **settings: Any) -> Source:
    trunk = timm.create_model(name, pretrained=True, **settings)
    data = resolve_model_data_config(trunk)
    return Source(trunk_state(trunk), image_config(trunk, name), mean=data["mean"], std=data["std"])


def _check_towers(name: str, source: Source, model: MLIP) -> None:
    """Raise where a tower of the source says otherwise than that of the model, with the options that would agree."""
    options = []
    for part, found in (("image", source.image), ("text", source.text)):
        if found is None:
            continue
        wanted = getattr(model.config, part)
        for field in dataclasses.fields(found):
            value = getattr(found, field.name)
            if field.name != "drop_path" and value != getattr(wanted, field.name):
                option = field.name.replace("_", "-")
                said = f" {value}" if not isinstance(value, bool) else ""
                options.append(f"--model.{part}.{'no-' if value is False else ''}{option}{said}")
    if options:
        raise ValueError(f"pretrained: {name} has other towers than the model; it would fit with {' '.join(options)}")


def _for_clip_pictures(source: Source, *, bias: bool) -> dict[str, Tensor]:
    """The state of a source whose patch embedding takes pictures with CLIP's mean and deviation taken out.

    With another mean m and deviation s, ``(p − m)/s`` is ``a·x + b`` of CLIP's ``x``: a goes into the weight, and what
    b adds to every patch into the bias or, where there is none, into the positions.
    """
    state = dict(source.state)
    if PATCHES in state and bias and BIAS not in state:
        state[BIAS] = torch.zeros_like(state[PATCHES][:, 0, 0, 0])
    if PATCHES not in state or (tuple(source.mean), tuple(source.std)) == (CLIP_MEAN, CLIP_STD):
        return state
    weight = state[PATCHES].double()
    mean, std, clip_mean, clip_std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None]
        for values in (source.mean, source.std, CLIP_MEAN, CLIP_STD)
    )
    added = (weight * ((clip_mean - mean) / std)).sum((1, 2, 3)).to(state[PATCHES])
    state[PATCHES] = (weight * (clip_std / std)).to(state[PATCHES])
    if BIAS in state:
        state[BIAS] = state[BIAS] + added
    else:
        positions = state[POSITIONS].clone()
        positions[:, 1:] += added
        state[POSITIONS] = positions
    return state
