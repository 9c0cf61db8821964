"""A trained `MLIP` as a folder that open_clip or timm loads, and the call that lets it merge tokens again there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from mlip_kernels.models.config import MLIPConfig
from mlip_kernels.models.folder import is_pretrained, save_pretrained, write_json, write_safetensors
from mlip_kernels.models.mlip import MLIP
from mlip_kernels.models.open_clip_exchange import open_clip_config
from mlip_kernels.models.open_clip_names import theirs
from mlip_kernels.models.timm_trunk import timm_config, timm_state
from mlip_kernels.nn.guidance import GUIDES
from mlip_kernels.train import checkpoint

Target = Literal["open_clip", "timm", "safetensors"]
TARGETS = ("open_clip", "timm", "safetensors")
CHOICES = ("none", *GUIDES)
"""Guides that a patched model can have; those that read frequencies take the energy of the patches."""


class Exported(NamedTuple):
    """What was written."""

    folder: Path
    load: str
    """The line of Python that loads it."""
    merge: str | None
    """The line that lets it merge as the model does, or ``None`` where nothing merges or the folder says it all."""
    left: tuple[str, ...]
    """Parts of the model that the folder has not: those that serve training alone, and for timm the text tower."""


def read(source: Path) -> MLIP:
    """The model in a folder of `MLIP.save_pretrained` or in a checkpoint of the trainer, in evaluation mode.

    Raises:
        OSError: if it is not there or cannot be read; names it.
        ValueError: if it is damaged, or something else; names it.
    """
    if source.is_dir():
        inner = source / "model"
        return MLIP.from_pretrained(inner if not is_pretrained(source) and is_pretrained(inner) else source)
    state = checkpoint.load(source)
    try:
        model = MLIP(MLIPConfig.from_dict(state["config"]["model"]))
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as failure:
        reason = " ".join(str(failure).split())[:300]
        raise ValueError(f"{source}: not a checkpoint of this version of the trainer: {reason}") from failure
    return model.eval()


def merging_arguments(config: MLIPConfig, guide: str | None = None) -> dict[str, Any] | None:
    """Arguments of ``mlip_kernels.patch.*.apply`` by which the image tower merges what it merges in evaluation.

    Args:
        config: of the model.
        guide: one of `CHOICES`, in place of the guide of ``config``.

    Returns:
        The arguments, or ``None`` where nothing merges.

    Raises:
        ValueError: if a patched model cannot merge so; names the field and the way out.
    """
    if guide is not None and guide not in CHOICES:
        raise ValueError(f"guide: expected one of {', '.join(CHOICES)}, got {guide!r}")
    merging = config.merging
    if merging.granularity == "three_way":
        raise ValueError(
            "MergingConfig.granularity: a patched model merges by number, not by shares as 'three_way' does; export "
            "without merging (--no-merging)"
        )
    keep_rate = merging.keep_rate if merging.test_keep_rate is None else merging.test_keep_rate
    if keep_rate == 1:
        return None
    if guide is None:
        guide = merging.guide
        if config.merging.needs_frequency_tokens:
            raise ValueError(
                f"MergingConfig.guide: {guide!r} asks the Frequency Stage which tokens are informative, and only an "
                "MLIP has one; choose another guide, by which other tokens merge (--guide both takes the energy of the "
                "patches in its place), or export without merging (--no-merging)"
            )
    arguments: dict[str, Any] = {"keep_rate": keep_rate}
    if merging.layers is not None:
        arguments["layers"] = merging.layers
    if merging.overall:
        arguments["overall"] = True
    if guide != "none":
        arguments["guide"] = guide
        if merging.guide_weight != 1:
            arguments["guide_weight"] = merging.guide_weight
        if guide in ("frequency", "both"):
            arguments["energy_cutoff"] = merging.energy_cutoff
    if not merging.proportional_attention:
        arguments["proportional_attention"] = False
    return arguments


def export(model: MLIP, to: Target, output: str | Path, *, guide: str | None = None, merging: bool = True) -> Exported:
    """Write ``model`` to the folder ``output`` in the form of another library.

    ``"open_clip"`` has both towers, for ``open_clip.create_model_and_transforms("local-dir:…")``; ``"timm"`` the image
    tower with its projection as head, for ``timm.create_model("local-dir:…", pretrained=True)``; both have the
    preprocessing. ``"safetensors"`` is `MLIP.save_pretrained`, which keeps everything.

    Args:
        model: the model.
        to: the form.
        output: a folder that is new or empty.
        guide: as in `merging_arguments`.
        merging: whether the model is to merge tokens there, too.

    Raises:
        ValueError: if the form cannot express the model, or the folder holds files; names the field and the way out.
        OSError: if a file cannot be written; names it.
    """
    if to not in TARGETS:
        raise ValueError(f"to: expected one of {', '.join(TARGETS)}, got {to!r}")
    if not isinstance(model, MLIP):
        raise TypeError(f"model: expected MLIP, got {type(model).__name__}")
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output: expected a new or empty folder, got {folder}, which holds files")
    if to == "safetensors":
        save_pretrained(model, folder)
        return Exported(
            folder, f"from mlip_kernels.models import MLIP; model = MLIP.from_pretrained({str(folder)!r})", None, ()
        )
    arguments = merging_arguments(model.config, guide) if merging else None
    state = model.state_dict()
    where = f"local-dir:{folder}"
    if to == "open_clip":
        config: dict[str, Any] = {
            "model_cfg": open_clip_config(model.config),
            "preprocess_cfg": {**model.preprocessing.to_dict(), "mode": "RGB"},
        }
        written, names = theirs(state), ("open_clip_model.safetensors", "open_clip_config.json")
        load = f"import open_clip; model, _, preprocess = open_clip.create_model_and_transforms({where!r})"
    else:
        config = _timm_json(model)
        written, names = timm_state(state), ("model.safetensors", "config.json")
        load = f"import timm; model = timm.create_model({where!r}, pretrained=True)"
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(written, folder / names[0])
    write_json(config, folder / names[1])
    merge = None
    if arguments is not None:
        settings = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        merge = f"from mlip_kernels.patch import {to} as patch; patch.apply(model, {settings})"
    taken = {"visual", "visual_projection"} | ({"text", "logit_scale"} if to == "open_clip" else set())
    left = dict.fromkeys(name.partition(".")[0] for name in state)
    return Exported(folder, load, merge, tuple(part for part in left if part not in taken))


def _timm_json(model: MLIP) -> dict[str, Any]:
    """What timm reads from ``config.json``."""
    architecture, arguments = timm_config(model.config)
    preprocessing = model.preprocessing
    crops = {"shortest": "center", "squash": "squash"}
    if preprocessing.resize_mode not in crops:
        raise ValueError(
            f"Preprocessing.resize_mode: timm has no {preprocessing.resize_mode!r}; expected one of {', '.join(crops)}"
        )
    size = model.config.image.image_size
    return {
        "architecture": architecture,
        "num_classes": model.config.embed_dim,
        "num_features": model.config.image.width,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": preprocessing.interpolation,
            "crop_pct": 1.0,
            "crop_mode": crops[preprocessing.resize_mode],
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "num_classes": model.config.embed_dim,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
