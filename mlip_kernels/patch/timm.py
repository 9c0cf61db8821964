"""Token merging in timm's vision transformers: `apply` to a model that exists, `remove` to have it back as it was.

    model = timm.create_model("vit_base_patch16_224", pretrained=True)
    mlip_kernels.patch.timm.apply(model, r=16)

Every block merges its r most similar pairs of patch tokens between attention and MLP (Bolya et al., "Token Merging:
Your ViT But Faster", ICLR 2023), and attention counts a merged token for the patches it stands for. Class, register
and distillation tokens never merge. What the model returns keeps its shape: where patch tokens are asked for, every
patch gets the token it has merged into, so pooling weighs a merged token by its size and dense heads stay on the grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from timm.layers import Attention, PatchDropout
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from mlip_kernels.nn.guidance import GUIDES, READS_ENERGY, Guide
from mlip_kernels.nn.merging_blocks import (
    MergeRule,
    MergeState,
    MergingBlock,
    MergingResPostBlock,
    last_state,
    merging_states,
)
from mlip_kernels.ops.arguments import check_integer, check_number
from mlip_kernels.ops.merging import MergePlan, keep_rate_schedule, merge_schedule
from mlip_kernels.ops.spectral import token_energy

Rate = int | tuple[int, float] | list[int]

ENERGY_CUTOFF = 0.5

BLOCKS: dict[type[nn.Module], type[nn.Module]] = {Block: MergingBlock, ResPostBlock: MergingResPostBlock}


@dataclass(frozen=True)
class Merging:
    """The settings of a patched model."""

    r: Rate = 0
    """Tokens to merge in each block, in one of the forms of `mlip_kernels.merge_schedule`."""
    keep_rate: float | None = None
    """Instead of r: the share of patch tokens to keep, as in `mlip_kernels.keep_rate_schedule`."""
    layers: tuple[int, ...] | None = None
    """The blocks that merge under ``keep_rate``."""
    overall: bool = False
    """Whether ``keep_rate`` is the share kept at the end, not in every merging block."""
    guide: Guide | None = None
    """How informative tokens are: informative ones merge last."""
    guide_weight: float = 1.0
    """Factor of the guide."""
    energy_cutoff: float | None = None
    """Normalised frequency from which on energy is high-frequency energy; ``None`` where no guide reads it."""
    proportional_attention: bool = True
    """Whether a merged token attracts as much attention as the patches it stands for."""
    max_merges: int | None = None
    """How many tokens may merge into one at most, in one block; ``None``: any number."""

    def schedule(self, depth: int, patches: int) -> list[int]:
        """r of every block."""
        if self.keep_rate is None:
            return merge_schedule(self.r, depth)
        return keep_rate_schedule(self.keep_rate, patches, depth, layers=self.layers, overall=self.overall)


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
) -> nn.Module:
    """Let a timm ``VisionTransformer`` (or DeiT's, with a distillation token) merge tokens, in place.

    Applied again, it changes the settings. Parameters, buffers, hooks and the state dict stay as they are; the patched
    model can be trained, copied, pickled, compiled and exported, and computes what it computed before while nothing
    merges. ``model.r`` may be set at any time.

    Args:
        model: the model; all its blocks have to be timm's ``Block`` or ``ResPostBlock`` with timm's ``Attention``.
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

    Returns:
        The model itself.

    An ``attn_mask`` has to be a mask of keys while tokens merge: boolean, ``[B, N]`` or broadcastable
    ``[B, 1, 1, N]``, True for real tokens; masked tokens neither merge nor are attended to. Causal attention is
    refused then.

    Raises:
        TypeError: the model, a block or its attention is of a type that merging would not leave right.
        ValueError: a setting is out of range.
    """
    vit = _checked(model)
    if keep_rate is not None and r != 0:
        raise ValueError(f"keep_rate: expected either r or keep_rate, got r={r} and keep_rate={keep_rate}")
    if isinstance(guide, str):
        if guide not in GUIDES:
            raise ValueError(f"guide: expected one of {sorted(GUIDES)}, a function or None, got {guide!r}")
        guide = GUIDES[guide]
    elif guide is not None and not callable(guide):
        raise TypeError(f"guide: expected one of {sorted(GUIDES)}, a function or None, got {type(guide).__name__}")
    check_number("guide_weight", guide_weight)
    if max_merges is not None:
        check_integer("max_merges", max_merges, minimum=1)
    if energy_cutoff is not None:
        check_number("energy_cutoff", energy_cutoff, minimum=0.0, maximum=1.0)
    elif guide in READS_ENERGY:
        energy_cutoff = ENERGY_CUTOFF
    settings = Merging(
        r=r,
        keep_rate=keep_rate,
        layers=None if layers is None else tuple(layers),
        overall=overall,
        guide=guide,
        guide_weight=guide_weight,
        energy_cutoff=energy_cutoff,
        proportional_attention=proportional_attention,
        max_merges=max_merges,
    )
    settings.schedule(len(vit.blocks), vit.patch_embed.num_patches)  # what it refuses is refused before any change
    for block in vit.blocks:
        block.__class__ = BLOCKS.get(type(block), type(block))
    vit.__class__ = MODELS.get(type(vit), type(vit))
    cast(_MergingModel, vit).merging = settings
    return vit


def remove(model: nn.Module) -> nn.Module:
    """Undo `apply`, in place; a model that is not patched stays as it is."""
    originals = {patched: original for original, patched in (MODELS | BLOCKS).items()}
    if isinstance(model, _MergingModel):
        for block in model.blocks:
            block.__class__ = originals.get(type(block), type(block))
        del model.merging
        model.__class__ = originals[type(model)]  # type: ignore[assignment]
    return model


class _MergingModel(VisionTransformer):
    """What both patched models have in common."""

    merging: Merging

    @property
    def r(self) -> Rate:
        """Tokens to merge in each block."""
        return self.merging.r

    @r.setter
    def r(self, r: Rate) -> None:
        merge_schedule(r, len(self.blocks))
        self.merging = replace(self.merging, r=r, keep_rate=None)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As the model's own."""
        state = last_state(self._states(x, attn_mask, is_causal))
        reads_patches = self.attn_pool is not None or self.global_pool != "token"
        return self.forward_head(self.norm(_tokens(state, reads_patches)))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As the model's own, ``[B, N, D]``: every patch has the token it has merged into."""
        return self.norm(_tokens(last_state(self._states(x, attn_mask, is_causal)), True))

    def forward_merged(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor | None, MergePlan | None]:
        """The merged tokens themselves, normalised.

        Returns:
            ``tokens [B, N', D]``; ``size [B, N']``, the patches each stands for; and the plan that leads to them from
            the N tokens before the first block. The last two are None where nothing has merged.
        """
        state = last_state(self._states(x, attn_mask, is_causal))
        return self.norm(state.tokens), state.size, state.plan

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As the model's own: every patch has the token it has merged into."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.blocks), indices)
        prefix, patches = [], []
        for index, state in enumerate(self._states(x, attn_mask, is_causal, last + 1 if stop_early else None)):
            if index in taken:
                tokens = _tokens(state, True)
                tokens = self.norm(tokens) if norm else tokens
                prefix.append(tokens[:, : self.num_prefix_tokens])
                patches.append(tokens[:, self.num_prefix_tokens :])
        if output_fmt == "NCHW":
            height, width = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
            patches = [p.transpose(1, 2).reshape(p.shape[0], -1, height, width) for p in patches]

        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            named: dict[str, Any] = {"image_intermediates": patches}
            if with_prefix:
                named["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                named["image_features"] = self.norm(_tokens(state, True))
            return named
        intermediates: list[Any] = list(zip(patches, prefix, strict=True)) if with_prefix else patches
        if intermediates_only:
            return intermediates
        return self.norm(_tokens(state, True)), intermediates

    def _states(
        self, images: Tensor, attn_mask: Tensor | None, is_causal: bool, blocks: int | None = None
    ) -> Iterator[MergeState]:
        """The states behind the first ``blocks`` blocks, or behind all."""
        tokens = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))
        schedule = self.merging.schedule(len(self.blocks), tokens.shape[1] - self.num_prefix_tokens)
        rule = MergeRule(
            prefix_tokens=self.num_prefix_tokens,
            class_token=self.cls_token is not None,
            guide=self.merging.guide,
            guide_weight=self.merging.guide_weight,
            proportional_attention=self.merging.proportional_attention,
            max_merges=self.merging.max_merges,
        )
        state = MergeState(tokens)
        if any(schedule):
            mask = _key_mask(attn_mask, is_causal, tokens)
            grid = self._grid(images)
            energy = None if grid is None else self._energy(tokens, grid)
            state = state._replace(size=None if mask is None else mask.float(), mask=mask, grid=grid, energy=energy)
        return merging_states(
            list(self.blocks)[:blocks],
            state,
            schedule,
            rule,
            checkpointing=self.grad_checkpointing,
            **_given(attn_mask, is_causal),
        )

    def _grid(self, images: Tensor) -> tuple[int, int] | None:
        if isinstance(self.patch_drop, PatchDropout) and self.training:
            return None
        height, width = self.patch_embed.dynamic_feat_size((images.shape[2], images.shape[3]))
        return height, width

    def _energy(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor | None:
        cutoff = self.merging.energy_cutoff
        if cutoff is None:
            return None
        return token_energy(tokens.detach(), cutoff, grid=grid, prefix_tokens=self.num_prefix_tokens)


class MergingVisionTransformer(_MergingModel):
    """A patched ``VisionTransformer``."""


class MergingVisionTransformerDistilled(_MergingModel, VisionTransformerDistilled):
    """A patched ``VisionTransformerDistilled``."""


MODELS: dict[type[nn.Module], type[_MergingModel]] = {
    VisionTransformer: MergingVisionTransformer,
    VisionTransformerDistilled: MergingVisionTransformerDistilled,
}


def _checked(model: object) -> VisionTransformer:
    if not isinstance(model, VisionTransformer) or type(model) not in (*MODELS, *MODELS.values()):
        raise TypeError(
            "model: expected a timm VisionTransformer or VisionTransformerDistilled, whose forward this patch knows, "
            f"got {type(model).__name__}"
        )
    for index, block in enumerate(model.blocks):
        if type(block) not in (*BLOCKS, *BLOCKS.values()):
            raise TypeError(
                f"model.blocks[{index}]: expected a timm Block or ResPostBlock, got {type(block).__name__}, "
                "in which it is not known where tokens can merge"
            )
        if type(block.attn) is not Attention:
            raise TypeError(
                f"model.blocks[{index}].attn: expected timm.layers.Attention, got {type(block.attn).__name__}, "
                "which may read positions or keys that merging changes"
            )
    return model


def _key_mask(attn_mask: Tensor | None, is_causal: bool, tokens: Tensor) -> Tensor | None:
    """``[B, N]`` from a mask of keys."""
    if is_causal:
        raise ValueError("is_causal: expected False while tokens merge, since merging changes their order")
    if attn_mask is None:
        return None
    batch, count = tokens.shape[:2]
    shape = tuple(attn_mask.shape)
    keys = shape[-1:] == (count,) and (len(shape) == 2 or (len(shape) == 4 and shape[1:3] == (1, 1)))
    if attn_mask.dtype != torch.bool or not keys or shape[0] not in (1, batch):
        raise ValueError(
            f"attn_mask: expected a boolean mask of keys while tokens merge, [B, N] or [B, 1, 1, N] with B = {batch} "
            f"and N = {count}, got {attn_mask.dtype} of shape {list(shape)}"
        )
    return attn_mask.reshape(shape[0], count).expand(batch, count)


def _given(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """Only what was given: blocks of older timm versions take less."""
    return ({} if attn_mask is None else {"attn_mask": attn_mask}) | ({"is_causal": True} if is_causal else {})


def _tokens(state: MergeState, every_patch: bool) -> Tensor:
    """The tokens of a state; with ``every_patch``, one for each token that there was before the first block."""
    plan = state.plan if every_patch else None
    return state.tokens if plan is None else plan.unmerge(state.tokens)
