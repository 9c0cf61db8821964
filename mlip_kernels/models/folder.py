"""A model as a folder: ``config.json`` and ``model.safetensors``, which hold no code and need no trainer to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mlip_kernels import __version__
from mlip_kernels.models.config import MLIPConfig
from mlip_kernels.models.preprocessing import Preprocessing
from mlip_kernels.train.files import replacing

if TYPE_CHECKING:
    from mlip_kernels.models.mlip import MLIP

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = {"format": "mlip_kernels", "format_version": 1}
TOKENIZER = "clip_bpe"
"""CLIP's byte-pair encoding, the one tokenizer there is; the text tower says its context length and vocabulary."""

Model = TypeVar("Model", bound="MLIP")


def save_pretrained(model: MLIP, folder: Path) -> Path:
    """Write ``model`` to ``folder``; see `MLIP.save_pretrained`. Each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **FORMAT,
        "mlip_kernels": __version__,
        "model": model.config.to_dict(),
        "preprocessing": model.preprocessing.to_dict(),
        "tokenizer": {"kind": TOKENIZER, "context_length": model.config.text.context_length},
    }
    write_safetensors(model.state_dict(), folder / WEIGHTS)
    write_json(config, folder / CONFIG)
    return folder


def read_pretrained(kind: type[Model], folder: Path) -> Model:
    """The model of class ``kind`` in ``folder``; see `MLIP.from_pretrained`."""
    config, preprocessing = _read_config(folder)
    try:
        with torch.device("meta"):  # no time for random numbers that are replaced at once
            model = kind(config, preprocessing)
    except ValueError as failure:
        raise ValueError(f"{folder / CONFIG}: {failure}") from failure
    fill(model, read_safetensors(folder / WEIGHTS), str(folder / WEIGHTS))
    return model.eval()


def is_pretrained(folder: Path) -> bool:
    """Whether `save_pretrained` wrote ``folder``, as far as its names tell."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def fill(model: MLIP, state: dict[str, Tensor], name: str) -> None:
    """Let the parameters of ``model``, built on the meta device, be those of ``state``.

    Raises:
        ValueError: if a parameter is missing, unknown or of another shape; names it, and ``name`` for the state.
    """
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    faults = [f"no {key}" for key in wanted if key not in state]
    faults += [f"an unknown {key}" for key in state if key not in wanted]
    faults += [
        f"{key} of shape {list(state[key].shape)} for {list(shape)}"
        for key, shape in wanted.items()
        if key in state and state[key].shape != shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"{name}: does not fit the configuration: {', '.join(faults[:3])}{more}")
    model.load_state_dict(state, assign=True)
    model.text.attn_mask = model.text.build_causal_mask()  # the one buffer that no state dict holds
    _check_filled(model)


def _check_filled(model: nn.Module) -> None:
    left = [key for key, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if left:
        raise AssertionError(f"no values for {', '.join(left)}")


def _read_config(folder: Path) -> tuple[MLIPConfig, Preprocessing]:
    path = folder / CONFIG
    if not path.is_file():
        what = "no such folder" if not folder.is_dir() else f"no {CONFIG} in it"
        raise FileNotFoundError(
            f"{folder}: {what}; expected a folder of MLIP.save_pretrained, such as model/ in the output of mlip-train"
        )
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as failure:
        raise ValueError(f"{path}: not JSON: {failure}") from failure
    if not isinstance(values, dict) or values.get("format") != FORMAT["format"]:
        raise ValueError(f"{path}: not of MLIP.save_pretrained: expected 'format': 'mlip_kernels'")
    if values.get("format_version") != FORMAT["format_version"]:
        raise ValueError(
            f"{path}: expected format_version {FORMAT['format_version']}, got {values.get('format_version')!r}, "
            f"written by mlip_kernels {values.get('mlip_kernels')}; install that version"
        )
    tokenizer = values.get("tokenizer")
    if not isinstance(tokenizer, dict) or tokenizer.get("kind") != TOKENIZER:
        raise ValueError(f"{path}: expected a tokenizer of kind {TOKENIZER!r}, got {tokenizer!r}")
    try:
        return MLIPConfig.from_dict(values["model"]), Preprocessing.from_dict(values["preprocessing"])
    except KeyError as failure:
        raise ValueError(f"{path}: not of MLIP.save_pretrained: no {failure}") from failure
    except (TypeError, ValueError) as failure:
        raise ValueError(f"{path}: {failure}") from failure


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError, ValueError: if it is not there, or damaged; names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as failure:
        raise ValueError(f"{path}: not a whole safetensors file: {failure}") from failure


def write_safetensors(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors on any device; PyTorch's readers look for the format in the metadata."""
    data = save({name: value.detach().cpu().contiguous() for name, value in state.items()}, {"format": "pt"})
    with replacing(path) as file:
        file.write(data)


def write_json(values: dict[str, Any], path: Path) -> None:
    with replacing(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())
