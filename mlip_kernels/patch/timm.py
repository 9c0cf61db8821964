"""Token merging in timm's vision transformers: `apply` to a model that exists, `remove` to have it back as it was.

    model = timm.create_model("vit_base_patch16_224", pretrained=True)
    mlip_kernels.patch.timm.apply(model, r=16)

Every block merges its r most similar pairs of patch tokens between attention and MLP (Bolya et al., "Token Merging:
Your ViT But Faster", ICLR 2023), and attention counts a merged token for the patches it stands for. Class, register
and distillation tokens never merge. What the model returns keeps its shape: where patch tokens are asked for, every
patch gets the token it has merged into, so pooling weighs a merged token by its size and dense heads stay on the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn

from mlip_kernels.nn.attention import MergingAttention
from mlip_kernels.nn.guidance import Guide
from mlip_kernels.nn.merging_blocks import MergingBlock, MergingResPostBlock
from mlip_kernels.patch.classes import exchange, merges, restore, unwrapped
from mlip_kernels.patch.parts import check_part
from mlip_kernels.patch.settings import Merging, Rate, checked, warn_of_surprises
from mlip_kernels.patch.vision_transformer import (
    MODELS,
    REPLACED,
    MergingModel,
    MergingVisionTransformer,
    MergingVisionTransformerDistilled,
)

__all__ = [
    "Merging",
    "MergingModel",
    "MergingVisionTransformer",
    "MergingVisionTransformerDistilled",
    "Rate",
    "apply",
    "remove",
    "set_merging",
    "transformer",
]

BLOCKS: dict[type[nn.Module], type[nn.Module]] = {Block: MergingBlock, ResPostBlock: MergingResPostBlock}
ATTENTIONS: dict[type[nn.Module], type[nn.Module]] = {Attention: MergingAttention}


def apply(
    model: nn.Module,
    r: Rate = 0,
    *,
    keep_rate: float | None = None,
    layers: Sequence[int] | None = None,
    overall: bool = False,
    guide: Guide | str | None = None,
    guide_weight: float = 1.0,
    energy_cutoff: float | None = None,
    proportional_attention: bool = True,
    max_merges: int | None = None,
    threshold: float | None = None,
    training_only: bool = False,
) -> nn.Module:
    """Let a timm ``VisionTransformer`` (or DeiT's, with a distillation token) merge tokens, in place.

    Applied again, it changes the settings, all of them (`set_merging` changes some). Parameters, buffers, hooks and the
    state dict stay as they are; the patched model can be trained, copied, pickled, compiled, exported and sharded, and
    computes what it computed before while nothing merges. ``model.r`` may be set at any time.

    Args:
        model: the model; all its blocks have to be timm's ``Block`` or ``ResPostBlock`` with timm's ``Attention``.
            Subclasses may add to them, but not replace a forward. Or a module around one such model: open_clip's
            ``TimmModel``, a ``Sequential``, a compiled model, ``DistributedDataParallel``, FSDP.
        r: tokens to merge: an integer for every block, a pair ``(r, inflection)``, or a list (`merge_schedule`).
        keep_rate: instead of r, the share of patch tokens to keep (`keep_rate_schedule`), with ``layers`` and
            ``overall``.
        guide: what keeps informative tokens from merging: ``"spatial"`` (attention of the class token; without one, the
            length of the keys), ``"key_norm"``, ``"frequency"`` (high-frequency energy of the patches), ``"both"``
            (mean of spatial and frequency), or a function of a `mlip_kernels.nn.guidance.GuideContext` that returns
            ``[B, N]``.
        guide_weight: factor of the guide against cosine similarities.
        energy_cutoff: normalised frequency in [0, 1] from which on energy counts as high-frequency energy, 0.5 for the
            guides above that read it. A function of its own finds the energy in its context if this is given.
        proportional_attention: count merged tokens by their size in attention.
        max_merges: how many tokens may merge into one at most, in one block (`mlip_kernels.merge_plan`). It keeps flat
            images from collapsing; plans are then made in plain PyTorch.
        threshold: cosine similarity in [-1, 1] below which two tokens do not merge, whatever r says
            (`mlip_kernels.merge_plan`). Images of one batch then keep different numbers of tokens, and the shorter ones
            have padding at the end; plans are made in plain PyTorch.
        training_only: merge in training mode only; in evaluation mode the model is the one that was given.

    Returns:
        The model itself, as it was given.

    An ``attn_mask`` has to be a mask of keys while tokens merge: ``[B, 1, 1, N]``, or ``[B, N]`` where B is not N,
    boolean or integer, true for real tokens; masked tokens neither merge nor are attended to. Causal attention is
    refused then. Where ``attn.fused_attn`` is false, attention is written out as in timm: ``attn.scale`` is read, and
    hooks of ``attn.attn_drop`` see its maps, over the merged tokens where tokens have merged.

    Blocks that are called one by one merge nothing: the model tells them what to merge. Code that runs the blocks
    itself calls ``model.forward_blocks(tokens)`` instead; ``model.forward_merged(x)`` returns the merged tokens.
    FSDP2's ``register_fsdp_forward_method`` comes after the patch. Activation-checkpoint wrappers of blocks break the
    graph of ``torch.compile``; for ``fullgraph=True``, use ``model.set_grad_checkpointing`` instead, or set
    ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint``.

    Raises:
        TypeError: there is no such model, or a block, its attention or a forward is not one that merging would leave
            right.
        ValueError: a setting is out of range, or the module holds more than one such model.

    Warns:
        UserWarning: a list r is shorter than the depth, or hardly any token is left.
    """
    vit = transformer(model)
    _check_parts(vit)
    if vit is not model and not isinstance(vit, MergingModel) and any(_merges(block) for block in vit.blocks):
        raise ValueError(f"model: expected one that does not merge yet, but {type(model).__name__} merges by itself")
    settings = checked(
        len(vit.blocks),
        vit.patch_embed.num_patches,
        r=r,
        keep_rate=keep_rate,
        layers=layers,
        overall=overall,
        guide=guide,
        guide_weight=guide_weight,
        energy_cutoff=energy_cutoff,
        proportional_attention=proportional_attention,
        max_merges=max_merges,
        threshold=threshold,
        training_only=training_only,
    )  # what it refuses is refused before any change
    warn_of_surprises(settings, len(vit.blocks), vit.patch_embed.num_patches)
    for block in map(unwrapped, vit.blocks):
        exchange(_attention(block), ATTENTIONS)
        exchange(block, BLOCKS)
    exchange(vit, MODELS)
    cast(MergingModel, vit).merging = settings
    return model


def remove(model: nn.Module) -> nn.Module:
    """Undo `apply`, in place, also inside wrappers that came later; a transformer that is not patched stays as it is.

    Raises:
        TypeError: there is no timm ``VisionTransformer`` in the module.
    """
    found = _transformers(model)
    if not found:
        raise TypeError(_unknown(model))
    for vit in found.values():
        if isinstance(vit, MergingModel):
            for block in map(unwrapped, vit.blocks):
                restore(_attention(block), ATTENTIONS)
                restore(block, BLOCKS)
            del vit.merging
            restore(vit, MODELS)
    return model


def set_merging(model: nn.Module, **settings: Any) -> nn.Module:
    """Change some settings of a patched model, by their names in `apply`; the others stay.

    ``set_merging(model, training_only=True)``. A new r ends a keep rate, and a new keep rate an r.

    Raises:
        TypeError, ValueError: as `apply`, or the model is not patched.
    """
    vit = transformer(model)
    if not isinstance(vit, MergingModel):
        raise TypeError(f"model: expected a patched model, got {type(vit).__name__}; call apply first")
    vit.set_merging(**settings)
    return model


def transformer(model: nn.Module) -> VisionTransformer:
    """The one timm ``VisionTransformer`` that a module is or holds; ``transformer(model).r`` reads its setting.

    Raises:
        TypeError: there is none.
        ValueError: there are several; the error says where.
    """
    found = _transformers(model)
    if not found:
        raise TypeError(_unknown(model))
    if len(found) > 1:
        places = ", ".join(f"model.{name}" for name in found)
        raise ValueError(
            f"model: expected one timm VisionTransformer, got {type(model).__name__} with {len(found)} of them; give "
            f"one of {places}"
        )
    return next(iter(found.values()))


def _transformers(model: object) -> dict[str, VisionTransformer]:
    """All that a module is or holds, by name. What is inside a transformer is its own affair."""
    if isinstance(model, VisionTransformer):
        return {"": model}
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return {name: module for name, module in modules if isinstance(module, VisionTransformer)}


def _unknown(model: object) -> str:
    wanted = "a timm VisionTransformer or VisionTransformerDistilled, or a module that holds one"
    message = f"model: expected {wanted}, got {type(model).__name__}"
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            kind = type(module)
            if name and any(word in kind.__name__ for word in ("Vision", "ViT")):
                package = kind.__module__.partition(".")[0]
                return f"{message}; its {name} is the {kind.__name__} of {package}, which this patch does not know"
    return message


def _check_parts(vit: VisionTransformer) -> None:
    check_part("model", vit, MODELS, REPLACED, "a timm VisionTransformer or VisionTransformerDistilled", "")
    for index, block in enumerate(map(unwrapped, vit.blocks)):
        where = f"model.blocks[{index}]"
        why = ", in which it is not known where tokens can merge"
        check_part(where, block, BLOCKS, ("__call__", "forward"), "a timm Block or ResPostBlock", why)
        why = ", which may read positions or keys that merging changes"
        check_part(
            f"{where}.attn", _attention(block), ATTENTIONS, ("__call__", "forward"), "timm.layers.Attention", why
        )


def _attention(block: nn.Module) -> nn.Module:
    return unwrapped(cast(nn.Module, block.attn))


def _merges(block: nn.Module) -> bool:
    return merges(type(unwrapped(block)), BLOCKS)
