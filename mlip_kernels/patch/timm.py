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
from typing import Any, NamedTuple, cast

from timm.layers import Attention
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn

from mlip_kernels.nn.attention import MergingAttention
from mlip_kernels.nn.guidance import Guide
from mlip_kernels.nn.merging_blocks import MergingBlock, MergingResPostBlock
from mlip_kernels.patch import eva, eva_blocks, vision_transformer
from mlip_kernels.patch.classes import Table, exchange, merges, restore, unwrapped
from mlip_kernels.patch.eva import MergingEva
from mlip_kernels.patch.merging_model import REPLACED, MergingModel
from mlip_kernels.patch.parts import check_part, only_one
from mlip_kernels.patch.settings import Merging, Rate, checked, warn_of_surprises
from mlip_kernels.patch.vision_transformer import MergingVisionTransformer, MergingVisionTransformerDistilled

__all__ = [
    "Merging",
    "MergingEva",
    "MergingModel",
    "MergingVisionTransformer",
    "MergingVisionTransformerDistilled",
    "Rate",
    "apply",
    "remove",
    "set_merging",
    "transformer",
]

Transformer = VisionTransformer | Eva


class _Parts(NamedTuple):
    """Of what a kind of transformer has to be made, for it to merge."""

    blocks: Table
    attentions: Table
    wanted_blocks: str
    wanted_attentions: str


VIT = _Parts(
    {Block: MergingBlock, ResPostBlock: MergingResPostBlock},
    {Attention: MergingAttention},
    "a timm Block or ResPostBlock",
    "timm.layers.Attention",
)
EVA = _Parts(
    eva_blocks.BLOCKS,
    eva_blocks.ATTENTIONS,
    "a timm EvaBlock or EvaBlockPostNorm",
    "timm's EvaAttention or AttentionRope",
)
MODELS: Table = {**vision_transformer.MODELS, **eva.MODELS}
BLOCKS: Table = {**VIT.blocks, **EVA.blocks}
ATTENTIONS: Table = {**VIT.attentions, **EVA.attentions}

WANTED = "a timm VisionTransformer or VisionTransformerDistilled or Eva"


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
    """Let a timm ``VisionTransformer`` (also DeiT's, with a distillation token) or ``Eva`` merge tokens, in place.

    Applied again, it changes the settings, all of them (`set_merging` changes some). Parameters, buffers, hooks and the
    state dict stay as they are; the patched model can be trained, copied, pickled, compiled, exported and sharded, and
    computes what it computed before while nothing merges. ``model.r`` may be set at any time.

    Args:
        model: the model; all its blocks have to be timm's ``Block`` or ``ResPostBlock`` with timm's ``Attention``, or
            ``EvaBlock`` or ``EvaBlockPostNorm`` with ``EvaAttention`` or ``AttentionRope``. Subclasses may add to them,
            but not replace a forward. Or a module around one such model: open_clip's ``TimmModel``, a ``Sequential``, a
            compiled model, ``DistributedDataParallel``, FSDP.
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
        TypeError: there is no timm ``VisionTransformer`` or ``Eva`` in the module.
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


def transformer(model: nn.Module) -> Transformer:
    """The one ``VisionTransformer`` or ``Eva`` of timm that a module is or holds; ``transformer(model).r`` reads its r.

    Raises:
        TypeError: there is none.
        ValueError: there are several; the error says where.
    """
    found = _transformers(model)
    if not found:
        raise TypeError(_unknown(model))
    return only_one(found, model, "timm transformer")


def _transformers(model: object) -> dict[str, Transformer]:
    """All that a module is or holds, by name. What is inside a transformer is its own affair."""
    if isinstance(model, Transformer):
        return {"": model}
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return {name: module for name, module in modules if isinstance(module, Transformer)}


def _unknown(model: object) -> str:
    message = f"model: expected {WANTED}, or a module that holds one, got {type(model).__name__}"
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            kind = type(module)
            if isinstance(module, NaFlexVit):
                where = f"; its {name} is timm's NaFlexVit" if name else ""
                return (
                    f"{message}{where}, whose batches hold images of several sizes with padding, which this patch does "
                    "not merge; for images of one size, timm.create_model(..., use_naflex=False) makes the other class"
                )
            if name and any(word in kind.__name__ for word in ("Vision", "ViT")):
                package = kind.__module__.partition(".")[0]
                return f"{message}; its {name} is the {kind.__name__} of {package}, which this patch does not know"
    return message


def _check_parts(vit: Transformer) -> None:
    check_part("model", vit, MODELS, REPLACED, WANTED, "")
    parts = EVA if isinstance(vit, Eva) else VIT
    for index, block in enumerate(map(unwrapped, vit.blocks)):
        where = f"model.blocks[{index}]"
        why = ", in which it is not known where tokens can merge"
        check_part(where, block, parts.blocks, ("__call__", "forward"), parts.wanted_blocks, why)
        why = ", which may read positions or keys that merging changes"
        check_part(
            f"{where}.attn", _attention(block), parts.attentions, ("__call__", "forward"), parts.wanted_attentions, why
        )


def _attention(block: nn.Module) -> nn.Module:
    return unwrapped(cast(nn.Module, block.attn))


def _merges(block: nn.Module) -> bool:
    return merges(type(unwrapped(block)), BLOCKS)
