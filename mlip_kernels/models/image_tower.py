"""The image tower: a timm ``VisionTransformer`` whose blocks can merge tokens between attention and MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlip_kernels.models.config import ImageConfig, MergingConfig
from mlip_kernels.nn.attention import attend
from mlip_kernels.nn.granularity import three_way_plan
from mlip_kernels.nn.guidance import class_attention, rank, similarity_to_pooled
from mlip_kernels.ops.merging import MergePlan, merge_plan, weighted_mean

PREFIX_TOKENS = 1


class Companion(NamedTuple):
    """What the frequency domain knows of the patches, at the granularity of the current tokens."""

    tokens: Tensor | None
    """``[B, N, D]`` frequency tokens, or ``None`` without a Frequency Stage."""
    pooled: Tensor | None
    """``[B, D]`` their pooled token."""
    energy: Tensor | None
    """``[B, N]`` high-frequency energy, or ``None`` where the guide does not use it."""


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
    companion: Companion
    """The frequency tokens, merged by the same plans."""


class MergeStep(NamedTuple):
    """What one block is to merge."""

    removed: int
    """Tokens that disappear; with ``shares`` it is not read."""
    shares: tuple[float, float] | None
    """Three-way shares, or ``None`` for size-carrying pair merging."""


class ImageTower(nn.Module):
    """A timm ``VisionTransformer`` with token merging guided by spatial and frequency semantics.

    Without merging steps it calls timm's blocks as they are and equals the plain transformer bit for bit.

    Args:
        config: sizes of the transformer.
        merging: what guides the merging and how attention treats merged tokens.
    """

    def __init__(self, config: ImageConfig, merging: MergingConfig) -> None:
        super().__init__()
        self.merging = merging
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
        )

    def embed(self, images: Tensor) -> Tensor:
        """Class token and patch tokens with positions, ``[B, 1 + H·W, D]``."""
        trunk = self.trunk
        return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images))))

    def forward(self, tokens: Tensor, companion: Companion, steps: Sequence[MergeStep | None]) -> ImageTokens:
        """Run the blocks on embedded tokens.

        Args:
            tokens: ``[B, 1 + H·W, D]`` from `embed`.
            companion: frequency semantics of the H·W patches.
            steps: one entry per block, ``None`` where the block merges nothing.

        Returns:
            `ImageTokens`; gradients flow through the averaging of merged tokens, never through their selection.
        """
        batch, count = tokens.shape[:2]
        size: Tensor | None = None
        origin = torch.arange(count, device=tokens.device).expand(batch, count)
        for block, step in zip(self.trunk.blocks, steps, strict=True):
            if step is None and size is None:
                tokens = self._run(block, tokens)
            else:
                tokens, size, origin, companion = self._run(
                    self._merging_block, block, step, tokens, size, origin, companion
                )
        tokens = self.trunk.norm(tokens)
        feature = tokens[:, 0] if self.pool == "token" else weighted_mean(tokens, size, prefix_tokens=PREFIX_TOKENS)
        return ImageTokens(
            feature=feature,
            tokens=tokens[:, PREFIX_TOKENS:],
            size=None if size is None else size[:, PREFIX_TOKENS:],
            origin=origin[:, PREFIX_TOKENS:] - PREFIX_TOKENS,
            companion=companion,
        )

    def _run(self, function: Callable[..., Any], *arguments: object) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _merging_block(
        self,
        block: Block,
        step: MergeStep | None,
        tokens: Tensor,
        size: Tensor | None,
        origin: Tensor,
        companion: Companion,
    ) -> tuple[Tensor, Tensor | None, Tensor, Companion]:
        """timm's block with a merge between attention and MLP (where ToMe and EViT put it)."""
        counted = size if self.merging.proportional_attention else None
        attended, query, keys = attend(block.attn, block.norm1(tokens), counted)
        tokens = tokens + block.drop_path1(block.ls1(attended))
        if step is not None:
            guide = self.guide(query, keys, size, companion)
            metric = keys.mean(1)
            if step.shares is None:
                plan = merge_plan(
                    metric,
                    step.removed,
                    size=size,
                    guide=guide,
                    guide_weight=self.merging.guide_weight,
                    prefix_tokens=PREFIX_TOKENS,
                )
            else:
                if guide is None:
                    raise ValueError("MergingConfig.guide: expected a guide for granularity='three_way', got 'none'")
                plan = three_way_plan(metric, guide, step.shares, size=size, prefix_tokens=PREFIX_TOKENS)
            companion = merge_companion(companion, plan)
            tokens, size = plan.merge(tokens)
            origin = plan.track(origin)
        tokens = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
        return tokens, size, origin, companion

    def guide(self, query: Tensor, keys: Tensor, size: Tensor | None, companion: Companion) -> Tensor | None:
        """How informative every token is, ``[B, N]`` in [0, 1], class token included; ``None`` without a guide."""
        ranks = []
        if self.merging.guide in ("spatial", "both"):
            ranks.append(rank(class_attention(query, keys, size)[:, PREFIX_TOKENS:]))
        if self.merging.guide in ("frequency", "both"):
            if companion.energy is not None:
                ranks.append(rank(companion.energy))
            elif companion.tokens is not None and companion.pooled is not None:
                ranks.append(rank(similarity_to_pooled(companion.tokens, companion.pooled)))
            else:
                raise ValueError(f"companion: expected frequency semantics for guide={self.merging.guide!r}, got none")
        if not ranks:
            return None
        guide = torch.stack(ranks).mean(0)
        return nn.functional.pad(guide, (PREFIX_TOKENS, 0))


def merge_companion(companion: Companion, plan: MergePlan) -> Companion:
    """Bring the frequency semantics of the patches to the granularity that ``plan`` leaves."""

    def merged(patches: Tensor) -> Tensor:
        padded = nn.functional.pad(patches, (0, 0, PREFIX_TOKENS, 0))
        return plan.merge(padded)[0][:, PREFIX_TOKENS:]

    return Companion(
        tokens=None if companion.tokens is None else merged(companion.tokens),
        pooled=companion.pooled,
        energy=None if companion.energy is None else merged(companion.energy[..., None])[..., 0],
    )
