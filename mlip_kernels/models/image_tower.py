"""The image tower: a timm ``VisionTransformer`` whose blocks can merge tokens between attention and MLP."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mlip_kernels.merging import weighted_mean
from mlip_kernels.models.config import ImageConfig, MergingConfig
from mlip_kernels.nn.guidance import GUIDES
from mlip_kernels.nn.merging_blocks import Amount, MergeRule, MergeState, MergingBlock, last_state, merging_states

PREFIX_TOKENS = 1


class Companion(NamedTuple):
    """What the frequency domain knows of the patches."""

    tokens: Tensor | None
    """``[B, H·W, D]`` frequency tokens, or ``None`` without a Frequency Stage."""
    pooled: Tensor | None
    """``[B, D]`` their pooled token."""
    energy: Tensor | None
    """``[B, H·W]`` high-frequency energy, or ``None`` where the guide does not use it."""


class ImageTokens(NamedTuple):
    """What the image tower returns."""

    feature: Tensor
    """``[B, D]`` global feature before its projection."""
    tokens: Tensor
    """``[B, N, D]`` patch tokens after the final norm, merged."""
    size: Tensor | None
    """``[B, N]`` float32, patches that each token stands for; ``None`` where nothing was merged."""
    origin: Tensor
    """``[B, H·W]`` int64, the token that each patch of the grid went into."""
    frequency_tokens: Tensor | None
    """``[B, N, D]`` the frequency tokens, merged by the same plans; ``None`` without a Frequency Stage."""


class ImageTower(nn.Module):
    """A timm ``VisionTransformer`` with token merging guided by spatial and frequency semantics.

    Where nothing merges it calls timm's blocks as they are and equals the plain transformer bit for bit.

    Args:
        config: sizes of the transformer.
        merging: what guides the merging and how attention treats merged tokens.
    """

    def __init__(self, config: ImageConfig, merging: MergingConfig) -> None:
        super().__init__()
        self.rule = MergeRule(
            prefix_tokens=PREFIX_TOKENS,
            class_token=True,
            guide=None if merging.guide == "none" else GUIDES[merging.guide],
            guide_weight=merging.guide_weight,
            proportional_attention=merging.proportional_attention,
        )
        self.pool = config.pool
        self.grid = config.grid
        self.gradient_checkpointing = False
        self.trunk = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            drop_path_rate=config.drop_path,
            num_classes=0,
            global_pool="token",
            pre_norm=config.pre_norm,
            norm_layer=partial(LayerNorm, eps=config.norm_epsilon),
            act_layer=None if config.activation == "gelu" else config.activation,
            block_fn=MergingBlock,
        )

    def embed(self, images: Tensor) -> Tensor:
        """Class token and patch tokens with positions, ``[B, 1 + H·W, D]``."""
        trunk = self.trunk
        return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images))))

    def forward(self, tokens: Tensor, companion: Companion, amounts: Sequence[Amount]) -> ImageTokens:
        """Run the blocks on embedded tokens.

        Args:
            tokens: ``[B, 1 + H·W, D]`` from `embed`.
            companion: frequency semantics of the H·W patches.
            amounts: what each block merges.

        Returns:
            `ImageTokens`; gradients flow through the averaging of merged tokens, never through their selection.
        """
        state, frequency_tokens = MergeState(tokens, grid=self.grid), companion.tokens
        if any(amounts):
            state = state._replace(
                energy=None if companion.energy is None else F.pad(companion.energy, (PREFIX_TOKENS, 0)),
                frequency_tokens=None if frequency_tokens is None else _behind_prefix(frequency_tokens),
                pooled_frequency=companion.pooled,
            )
        checkpointing = self.gradient_checkpointing
        state = last_state(merging_states(self.trunk.blocks, state, amounts, self.rule, checkpointing=checkpointing))
        if state.frequency_tokens is not None:
            frequency_tokens = state.frequency_tokens[:, PREFIX_TOKENS:]
        tokens, size = self.trunk.norm(state.tokens), state.size
        feature = tokens[:, 0] if self.pool == "token" else weighted_mean(tokens, size, prefix_tokens=PREFIX_TOKENS)
        return ImageTokens(
            feature=feature,
            tokens=tokens[:, PREFIX_TOKENS:],
            size=None if size is None else size[:, PREFIX_TOKENS:],
            origin=state.origin[:, PREFIX_TOKENS:] - PREFIX_TOKENS,
            frequency_tokens=frequency_tokens,
        )


def _behind_prefix(patches: Tensor) -> Tensor:
    """Rows of 0 for the prefix tokens in front of ``patches [B, N, D]``, so that plans fit."""
    return F.pad(patches, (0, 0, PREFIX_TOKENS, 0))
