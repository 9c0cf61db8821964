"""Token merging in open_clip's models: `apply` to one that exists, `remove` to have it back as it was.

    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-16", pretrained="laion2b_s34b_b88k")
    mlip_kernels.patch.open_clip.apply(model, keep_rate=0.7, layers=(3, 6, 9))

The blocks of the image tower merge similar patch tokens between attention and MLP, as `mlip_kernels.patch.timm` has
it; the text tower is never touched. What the model returns keeps its shape: ``encode_image``, ``output_tokens`` and
``forward_intermediates`` have one token for every patch, the one it has merged into.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from typing_extensions import Unpack

from mlip_kernels._extras import check_version, needing

with needing("integrations", "mlip_kernels.patch.open_clip"):
    check_version("open_clip", "open_clip_torch", (3, 0), (4, 0))
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

from mlip_kernels.patch import timm
from mlip_kernels.patch.classes import exchange, restore, unwrapped
from mlip_kernels.patch.open_clip_transformer import (
    ATTENTIONS,
    BLOCKS,
    TOWERS,
    TRANSFORMERS,
    MergingVisionTransformer,
)
from mlip_kernels.patch.parts import check_part, only_one
from mlip_kernels.patch.settings import Merging, Rate, Settings, checked, warn_of_surprises

__all__ = ["Merging", "MergingVisionTransformer", "Rate", "apply", "image_tower", "remove", "set_merging"]


def apply(model: nn.Module, r: Rate = 0, **settings: Unpack[Settings]) -> nn.Module:
    """Let the image tower of an open_clip model merge tokens, in place.

    Applied again, it changes the settings, all of them (`set_merging` changes some). Parameters, hooks and the state
    dict stay as they are; the patched model can be trained, locked, copied, pickled, compiled and sharded, and computes
    what it computed before while nothing merges. ``model.visual.r`` may be set at any time.

    Args:
        model: a ``CLIP``, ``CustomTextCLIP`` or ``CoCa``, its image tower, or a module around one of them. The tower is
            open_clip's ``VisionTransformer``, or a ``TimmModel`` around a trunk that `mlip_kernels.patch.timm` takes.
        r: tokens to merge, as in `mlip_kernels.patch.timm.apply`.
        settings: ``keep_rate``, ``guide`` and the others of `mlip_kernels.patch.timm.apply`. The guide ``"frequency"``
            needs all patches and so no patch dropout in training.

    Returns:
        The model itself, as it was given.

    Hooks of ``visual.transformer`` and of its blocks see tokens, those of the blocks merged ones. Blocks that are
    called one by one merge nothing. ``model.visual.forward_merged(images)`` returns the merged tokens. With patch
    dropout the rate follows the patches that are left. ``torch.jit.script`` does not take patched models.

    Raises:
        TypeError: there is no such tower, or a transformer, block or attention is not one that merging would leave
            right.
        ValueError: a setting is out of range, or the module holds more than one image tower.

    Warns:
        UserWarning: a list r is shorter than the depth, or hardly any token is left.
    """
    tower: Any = image_tower(model)
    if isinstance(tower, TimmModel):
        timm.apply(_trunk(tower), r, **settings)
        return model
    _check_parts(tower)
    transformer, (height, width) = tower.transformer, tower.grid_size
    depth = len(transformer.resblocks)
    merging = checked(depth, height * width, r=r, **settings)  # what it refuses is refused before any change
    warn_of_surprises(merging, depth, height * width)
    for block in map(unwrapped, transformer.resblocks):
        exchange(_attention(block), ATTENTIONS)
        exchange(block, BLOCKS)
    exchange(transformer, TRANSFORMERS)
    exchange(tower, TOWERS)
    transformer.merging, transformer.grid_size = merging, (height, width)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Undo `apply`, in place, also inside wrappers that came later; a tower that is not patched stays as it is.

    Raises:
        TypeError: there is no image tower that `apply` takes.
    """
    for tower in _found(model).values():
        if isinstance(tower, TimmModel):
            timm.remove(_trunk(tower))
        elif isinstance(tower, MergingVisionTransformer):
            transformer = tower.transformer
            for block in map(unwrapped, transformer.resblocks):
                restore(_attention(block), ATTENTIONS)
                restore(block, BLOCKS)
            del transformer.merging, transformer.grid_size
            restore(transformer, TRANSFORMERS)
            restore(tower, TOWERS)
    return model


def set_merging(model: nn.Module, **settings: Any) -> nn.Module:
    """Change some settings of a patched model, by their names in `apply`; the others stay.

    ``set_merging(model, training_only=True)``. A new r ends a keep rate, and a new keep rate an r.

    Raises:
        TypeError, ValueError: as `apply`, or the model is not patched.
    """
    tower: Any = image_tower(model)
    if isinstance(tower, TimmModel):
        timm.set_merging(_trunk(tower), **settings)
    elif isinstance(tower, MergingVisionTransformer):
        tower.set_merging(**settings)
    else:
        raise TypeError(f"model: expected a patched model, got {type(tower).__name__}; call apply first")
    return model


def image_tower(model: nn.Module) -> nn.Module:
    """The one image tower that a module is or holds.

    Raises:
        TypeError: there is none.
        ValueError: there are several; the error says where.
    """
    return only_one(_found(model), model, "image tower of open_clip")


def _found(model: object) -> dict[str, Any]:
    """All image towers that a module is or holds, by name."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    found = {name: module for name, module in modules if isinstance(module, (VisionTransformer, TimmModel))}
    if found:
        return found
    wanted = "an open_clip model whose image tower is a VisionTransformer or a TimmModel"
    message = f"model: expected {wanted}, got {type(model).__name__}"
    visual = getattr(model, "visual", None)
    if isinstance(visual, nn.Module):
        message += f", whose visual is a {type(visual).__name__} without tokens to merge"
    elif isinstance(model, timm.Transformer):
        message += "; mlip_kernels.patch.timm takes it"
    raise TypeError(message)


def _trunk(tower: TimmModel) -> timm.Transformer:
    trunk = unwrapped(tower.trunk)
    if not isinstance(trunk, timm.Transformer):
        raise TypeError(f"visual.trunk: expected {timm.WANTED}, got {type(trunk).__name__}")
    return trunk


def _attention(block: nn.Module) -> nn.Module:
    return unwrapped(cast(nn.Module, block.attn))


def _check_parts(tower: VisionTransformer) -> None:
    forward = ("__call__", "forward")
    check_part("visual", tower, TOWERS, ("__call__", "forward", "_embeds"), "open_clip's VisionTransformer", "")
    transformer = tower.transformer
    replaced = (*forward, "forward_intermediates")
    check_part("visual.transformer", transformer, TRANSFORMERS, replaced, "open_clip's Transformer", "")
    if not transformer.batch_first:
        raise TypeError("visual.transformer: expected batch_first=True, got False")
    for index, block in enumerate(map(unwrapped, transformer.resblocks)):
        where = f"visual.transformer.resblocks[{index}]"
        wanted = "open_clip's ResidualAttentionBlock or CustomResidualAttentionBlock"
        check_part(where, block, BLOCKS, forward, wanted, ", in which it is not known where tokens can merge")
        if hasattr(block, "ln_1_kv"):
            raise TypeError(f"{where}: expected a block of self-attention, got one of cross-attention")
        attention, where = _attention(block), f"{where}.attn"
        wanted = "torch.nn.MultiheadAttention or open_clip's Attention"
        why = ", which may read positions or keys that merging changes"
        check_part(where, attention, ATTENTIONS, forward, wanted, why)
        _check_attention(where, attention)


def _check_attention(where: str, attention: nn.Module) -> None:
    """Raise if an attention computes what the merging one does not."""
    if isinstance(attention, nn.MultiheadAttention):
        odd = {
            "keys or values of another width": attention.in_proj_weight is None,
            "bias_k and bias_v": attention.bias_k is not None or attention.bias_v is not None,
            "add_zero_attn": attention.add_zero_attn,
            "batch_first=False": not attention.batch_first,
        }
    else:
        odd = {"scaled cosine attention, which fails in open_clip itself": attention.logit_scale is not None}
    for what, found in odd.items():
        if found:
            raise TypeError(f"{where}: expected self-attention as in open_clip's image towers, got one with {what}")
