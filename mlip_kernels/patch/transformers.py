"""Token merging in Hugging Face's CLIP, SigLIP and SigLIP 2: `apply` to a model, `remove` to have it back as it was.

    model = transformers.AutoModel.from_pretrained("openai/clip-vit-base-patch16")
    mlip_kernels.patch.transformers.apply(model, r=8)

The layers of the vision model merge similar patch tokens between attention and MLP, as `mlip_kernels.patch.timm` has
it; the text model is never touched. What the model returns keeps its shape: ``last_hidden_state`` and all
``hidden_states`` have one token for every patch, the one it has merged into.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from typing_extensions import Unpack

from mlip_kernels._extras import check_version, needing

with needing("integrations", "mlip_kernels.patch.transformers"):
    check_version("transformers", "transformers", (5, 20), (6, 0))

from mlip_kernels.patch.classes import exchange, merges, restore, unwrapped
from mlip_kernels.patch.parts import check_part, only_one
from mlip_kernels.patch.settings import Merging, Rate, Settings, changed, checked, warn_of_surprises
from mlip_kernels.patch.transformers_encoders import ATTENTIONS, EMBEDDINGS, ENCODERS, LAYERS, MODELS

__all__ = ["Merging", "Rate", "apply", "merging_of", "remove", "set_merging", "vision_model"]


def apply(model: nn.Module, r: Rate = 0, **settings: Unpack[Settings]) -> nn.Module:
    """Let the vision model of a Hugging Face model merge tokens, in place.

    Applied again, it changes the settings, all of them (`set_merging` changes some). Parameters, the state dict and
    ``config`` stay as they are, and so does what ``save_pretrained`` writes: a model that is loaded again merges
    nothing until `apply` is called again.

    Args:
        model: a CLIP, SigLIP or SigLIP 2 model, or any model that holds the vision model of one of them: with
            projection, for image classification, as the vision tower of a language model.
        r: tokens to merge, as in `mlip_kernels.patch.timm.apply`.
        settings: ``keep_rate``, ``guide`` and the others of `mlip_kernels.patch.timm.apply`. Guides that read
            frequencies need images of the size in ``config``, and no SigLIP 2, whose images have grids of their own.

    Returns:
        The model itself, as it was given.

    Layers that merge, or whose tokens have merged, compute attention in this package, whatever
    ``attn_implementation`` says; the others keep theirs. ``output_hidden_states`` gives one token for every patch;
    ``output_attentions`` is refused while tokens merge. Padding of SigLIP 2 neither merges nor is attended to; with
    ``attn_implementation="flex_attention"`` padded batches are refused. Gradient checkpointing works in both of its
    modes. ``merging_of(model)`` reads the settings.

    Raises:
        TypeError: there is no such vision model, or a layer or its attention is not one that merging would leave right.
        ValueError: a setting is out of range, or the module holds more than one vision model.

    Warns:
        UserWarning: a list r is shorter than the depth, or hardly any token is left.
    """
    vision = vision_model(model)
    _check_parts(vision)
    encoder: Any = vision.encoder
    depth, patches = len(encoder.layers), _patches(vision)
    merging = checked(depth, patches, r=r, **settings)  # what it refuses is refused before any change
    _check_guide(vision, merging)
    warn_of_surprises(merging, depth, patches)
    for layer in _layers(vision):
        _exchange(layer.self_attn, ATTENTIONS)
        _exchange(layer, LAYERS)
    _exchange(encoder, ENCODERS)
    if _grid(vision) is not None:
        _exchange(vision.embeddings, EMBEDDINGS)
    encoder.grid = _grid(vision)
    _set(vision, merging)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Undo `apply`, in place; a model that is not patched stays as it is.

    Raises:
        TypeError: there is no vision model that `apply` takes.
    """
    for vision in _found(model).values():
        encoder = vision.encoder
        if not merges(type(encoder), ENCODERS):
            continue
        for layer in _layers(vision):
            _restore(layer.self_attn, ATTENTIONS)
            _restore(layer, LAYERS)
        del encoder.merging, encoder.grid
        _restore(encoder, ENCODERS)
        if merges(type(vision.embeddings), EMBEDDINGS):
            del vision.embeddings.reads_grid
            _restore(vision.embeddings, EMBEDDINGS)
    return model


def set_merging(model: nn.Module, **settings: Any) -> nn.Module:
    """Change some settings of a patched model, by their names in `apply`; the others stay.

    ``set_merging(model, training_only=True)``. A new r ends a keep rate, and a new keep rate an r.

    Raises:
        TypeError, ValueError: as `apply`, or the model is not patched.
    """
    vision = vision_model(model)
    new = changed(merging_of(model), len(vision.encoder.layers), _patches(vision), settings)
    _check_guide(vision, new)
    _set(vision, new)
    return model


def merging_of(model: nn.Module) -> Merging:
    """The settings of a patched model.

    Raises:
        TypeError: it is not patched.
    """
    encoder = vision_model(model).encoder
    if not merges(type(encoder), ENCODERS):
        raise TypeError(f"model: expected a patched model, got {type(model).__name__}; call apply first")
    return encoder.merging


def vision_model(model: nn.Module) -> Any:
    """The one vision model that a module is or holds.

    Raises:
        TypeError: there is none.
        ValueError: there are several; the error says where.
    """
    return only_one(_found(model), model, "vision model")


def _found(model: object) -> dict[str, Any]:
    """All vision models that a module is or holds, by name."""
    modules = list(model.named_modules()) if isinstance(model, nn.Module) else []
    found = {name: module for name, module in modules if isinstance(module, MODELS)}
    if found:
        return found
    wanted = "a model with a CLIPVisionModel, SiglipVisionModel or Siglip2VisionModel"
    message = f"model: expected {wanted}, got {type(model).__name__}"
    for name, module in modules:
        kind = type(module)
        if name and "Vision" in kind.__name__:
            message += f"; its {name} is a {kind.__name__} of {kind.__module__}, which this patch does not know"
            break
    raise TypeError(message)


def _layers(vision: Any) -> list[Any]:
    return [unwrapped(layer) for layer in vision.encoder.layers]


def _grid(vision: Any) -> tuple[int, int] | None:
    """Patches in a column and in a row, where all images have as many."""
    image = getattr(vision.config, "image_size", None)
    if image is None:
        return None
    side = image // vision.config.patch_size
    return side, side


def _patches(vision: Any) -> int:
    grid = _grid(vision)
    return vision.config.num_patches if grid is None else grid[0] * grid[1]


def _check_guide(vision: Any, settings: Merging) -> None:
    if settings.energy_cutoff is not None and _grid(vision) is None:
        raise ValueError(
            f"guide: expected one that reads no frequencies for {type(vision).__name__}, whose images have grids of"
            " their own; 'spatial' and 'key_norm' read none"
        )


def _set(vision: Any, settings: Merging) -> None:
    vision.encoder.merging = settings
    if merges(type(vision.embeddings), EMBEDDINGS):
        vision.embeddings.reads_grid = settings.energy_cutoff is not None


def _exchange(module: nn.Module, table: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Exchange the class, also below a hook of accelerate, which calls what the module's forward was."""
    module = unwrapped(module)
    exchange(module, table)
    _follow(module)


def _restore(module: nn.Module, table: dict[type[nn.Module], type[nn.Module]]) -> None:
    module = unwrapped(module)
    restore(module, table)
    _follow(module)


def _follow(module: Any) -> None:
    if "_old_forward" in vars(module):
        module._old_forward = type(module).forward.__get__(module)


def _check_parts(vision: Any) -> None:
    where = "vision_model.encoder"
    replaced = ("__call__", "forward")
    parts = [(where, vision.encoder, ENCODERS, "a CLIPEncoder, SiglipEncoder or Siglip2Encoder", "")]
    why = ", in which it is not known where tokens can merge"
    for index, layer in enumerate(_layers(vision)):
        here = f"{where}.layers[{index}]"
        parts.append((here, layer, LAYERS, "the encoder layer of CLIP, SigLIP or SigLIP 2", why))
        attention = unwrapped(getattr(layer, "self_attn", nn.Identity()))
        reads = ", which may read positions or keys that merging changes"
        parts.append((f"{here}.self_attn", attention, ATTENTIONS, "the attention of CLIP, SigLIP or SigLIP 2", reads))
    if _grid(vision) is not None:
        parts.append(("vision_model.embeddings", vision.embeddings, EMBEDDINGS, "the embeddings of CLIP or SigLIP", ""))
    for place, module, table, wanted, reason in parts:
        hooked = "_old_forward" in vars(module)
        check_part(place, module, table, () if hooked else replaced, wanted, reason)
