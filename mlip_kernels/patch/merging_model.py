"""What patched transformers of timm have in common: their settings, and outputs with a token for every patch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from timm.layers import PatchDropout, PatchDropoutWithIndices
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mlip_kernels.nn.merging_blocks import MergeState, last_state
from mlip_kernels.patch.settings import Merging, Rate, changed
from mlip_kernels.patch.states import Merged, block_states, given, in_original_order, known, tokens_of

REPLACED = ("__call__", "forward", "forward_features", "forward_intermediates")
"""What merging models do otherwise than timm's. A model that has its own has to be patched by hand."""

KNOWN_POOLS = (VisionTransformer.pool, Eva.pool)
KNOWN_HEADS = (VisionTransformer.forward_head, VisionTransformerDistilled.forward_head, Eva.forward_head)
"""With token pooling these read prefix tokens only."""


class MergingModel(nn.Module):
    """What all patched models have in common, in front of the class of timm.

    Blocks learn from the model what to merge. Called one by one, as in ``for block in model.blocks: x = block(x)``,
    they are timm's and merge nothing; ``forward_blocks`` is the entry for code that embeds the tokens itself.
    """

    merging: Merging
    num_prefix_tokens: int
    grad_checkpointing: bool
    blocks: Any
    patch_embed: Any
    norm: Any
    forward_head: Any

    @property
    def r(self) -> Rate:
        """Tokens to merge in each block; for a model with a keep rate, a list for images of the model's own size."""
        depth = len(self.blocks)
        if self.merging.keep_rate is not None:
            return self.merging.schedule(depth, self.patch_embed.num_patches)
        return self.merging.r[:depth] if isinstance(self.merging.r, list) else self.merging.r

    @r.setter
    def r(self, r: Rate) -> None:
        self.set_merging(r=r)

    def set_merging(self, **settings: Any) -> None:
        """Change some of the settings that `mlip_kernels.patch.timm.apply` takes, by its names; others stay."""
        self.merging = changed(self.merging, len(self.blocks), self.patch_embed.num_patches, settings)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, merged: bool = False
    ) -> Any:
        """As the model's own; with ``merged``, what `forward_merged` returns."""
        state = last_state(self._states(x, attn_mask, is_causal))
        if merged:
            return self.norm(state.tokens), state.size, state.plan
        return self.forward_head(self.norm(tokens_of(state, every_patch=self._head_reads_patches())))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As the model's own, ``[B, N, D]``: every patch has the token it has merged into."""
        return self.norm(tokens_of(last_state(self._states(x, attn_mask, is_causal))))

    def forward_merged(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        original_order: bool = False,
    ) -> Merged:
        """The merged tokens themselves, normalised.

        It is ``model(x, merged=True)``, so hooks of the model run, those of FSDP among them. A wrapper that has to be
        called itself takes that form: ``DistributedDataParallel(model)(x, merged=True)``.

        Args:
            x: images.
            attn_mask: as in `forward`.
            is_causal: as in `forward`.
            original_order: sort the tokens by where they come from (`MergePlan.in_original_order`).

        Returns:
            ``tokens [B, N', D]``; ``size [B, N']``, the patches each stands for, 0 for padding; and the plan that leads
            to them from the N tokens before the first block. The last two are None where nothing has merged.
        """
        tokens, size, plan = self(x, attn_mask=attn_mask, is_causal=is_causal, merged=True)
        if original_order and plan is not None:
            tokens, size, plan = in_original_order(tokens, size, plan)
        return tokens, size, plan

    def _embedded(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the first block takes: tokens ``[B, N, D]`` and, where the model has them, rotary positions."""
        raise NotImplementedError

    def _rotary(self, rope: Tensor | None) -> Callable[[int, MergeState], dict[str, Any]] | None:
        """What each block takes beside tokens, from the rotary positions of the patches."""
        return None

    def _intermediates(
        self,
        images: Tensor,
        indices: int | list[int] | None,
        norm: bool,
        stop_early: bool,
        output_fmt: str,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[list[Tensor], list[Tensor], MergeState]:
        """Patch tokens and prefix tokens behind the blocks asked for, and the state behind the last one that ran."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.blocks), indices)
        prefix, patches = [], []
        for index, state in enumerate(self._states(images, attn_mask, is_causal, last + 1 if stop_early else None)):
            if index in taken:
                tokens = tokens_of(state)
                tokens = self.norm(tokens) if norm else tokens
                prefix.append(tokens[:, : self.num_prefix_tokens])
                patches.append(tokens[:, self.num_prefix_tokens :])
        if output_fmt == "NCHW":
            height, width = self.patch_embed.dynamic_feat_size((images.shape[2], images.shape[3]))
            patches = [p.transpose(1, 2).reshape(p.shape[0], -1, height, width) for p in patches]
        return patches, prefix, state

    def _states(
        self, images: Tensor, attn_mask: Tensor | None, is_causal: bool, blocks: int | None = None
    ) -> Iterator[MergeState]:
        """The states behind the first ``blocks`` blocks, or behind all."""
        tokens, rope = self._embedded(images)
        return self._block_states(tokens, self._grid(images), attn_mask, is_causal, blocks, rope=rope)

    def _block_states(
        self,
        tokens: Tensor,
        grid: tuple[int, int] | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        blocks: int | None = None,
        *,
        rope: Tensor | None = None,
    ) -> Iterator[MergeState]:
        merging, depth, mask = self.merging, len(self.blocks), None
        schedule = [0] * depth
        if self.training or not merging.training_only:
            schedule = merging.schedule(depth, known(tokens.shape[1]) - self.num_prefix_tokens)
        if any(schedule):
            mask = _key_mask(attn_mask, is_causal, tokens)
        return block_states(
            list(self.blocks)[:blocks],
            tokens,
            schedule,
            merging,
            prefix_tokens=self.num_prefix_tokens,
            class_token=self.cls_token is not None,
            grid=grid,
            mask=mask,
            checkpointing=self.grad_checkpointing,
            arguments=self._rotary(rope),
            **given(attn_mask, is_causal),
        )

    def _own_grid(self, tokens: Tensor) -> tuple[int, int] | None:
        """Patches in a column and in a row of images of the model's own size, if tokens ``[B, N, D]`` fit it."""
        if tokens.shape[1] != self.num_prefix_tokens + self.patch_embed.num_patches:
            return None
        height, width = self.patch_embed.grid_size
        return height, width

    def _grid(self, images: Tensor) -> tuple[int, int] | None:
        if isinstance(self.patch_drop, (PatchDropout, PatchDropoutWithIndices)) and self.training:
            return None
        height, width = self.patch_embed.dynamic_feat_size((known(images.shape[2]), known(images.shape[3])))
        return height, width

    def _head_reads_patches(self) -> bool:
        if self.attn_pool is not None or self.global_pool != "token":
            return True
        kind: Any = type(self)
        return kind.pool not in KNOWN_POOLS or kind.forward_head not in KNOWN_HEADS


def _key_mask(attn_mask: Tensor | None, is_causal: bool, tokens: Tensor) -> Tensor | None:
    """``[B, N]`` from a mask of keys."""
    if is_causal:
        raise ValueError("is_causal: expected False while tokens merge, since merging changes their order")
    if attn_mask is None:
        return None
    batch, count = known(tokens.shape[0]), known(tokens.shape[1])
    shape = tuple(known(size) for size in attn_mask.shape)
    keys = shape[-1:] == (count,) and (len(shape) == 2 or (len(shape) == 4 and shape[1:3] == (1, 1)))
    countable = not (attn_mask.is_floating_point() or attn_mask.is_complex())
    if not countable or not keys or shape[0] not in (1, batch):
        raise ValueError(
            f"attn_mask: expected a boolean mask of keys while tokens merge, [B, N] or [B, 1, 1, N] with B = {batch} "
            f"and N = {count}, got {attn_mask.dtype} of shape {list(shape)}"
        )
    if shape == (count, count) and count > 1:
        raise ValueError(
            f"attn_mask: expected [B, 1, 1, N] where the batch is as large as the number of tokens, {count}: a mask "
            f"{list(shape)} could be one of keys [B, N] or one of pairs [N, N], which cannot be used while tokens merge"
        )
    return attn_mask.reshape(shape[0], count).expand(batch, count) != 0
