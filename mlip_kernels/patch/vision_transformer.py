"""timm's ``VisionTransformer`` with blocks that merge: what `mlip_kernels.patch.timm` makes of a model."""

from __future__ import annotations

from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mlip_kernels.nn.merging_blocks import last_state
from mlip_kernels.patch.merging_model import MergingModel
from mlip_kernels.patch.states import Merged, tokens_of


class MergingVisionTransformer(MergingModel, VisionTransformer):
    """A patched ``VisionTransformer``."""

    def forward_blocks(
        self,
        tokens: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        grid: tuple[int, int] | None = None,
    ) -> Merged:
        """The blocks alone, for code that embeds images, or adds tokens of its own, and normalises what comes out.

        Args:
            tokens: ``[B, N, D]``, what the first block takes: prefix tokens, then patches with their positions.
            attn_mask: as in `forward`.
            is_causal: as in `forward`.
            grid: patches in a column and in a row, for guides that read it. Default: the model's own, if it fits.

        Returns:
            As `forward_merged`, not normalised.
        """
        grid = self._own_grid(tokens) if grid is None else grid
        state = last_state(self._block_states(tokens, grid, attn_mask, is_causal))
        return state.tokens, state.size, state.plan

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
        patches, prefix, state = self._intermediates(x, indices, norm, stop_early, output_fmt, attn_mask, is_causal)
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            named: dict[str, Any] = {"image_intermediates": patches}
            if with_prefix:
                named["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                named["image_features"] = self.norm(tokens_of(state))
            return named
        intermediates: list[Any] = list(zip(patches, prefix, strict=True)) if with_prefix else patches
        if intermediates_only:
            return intermediates
        return self.norm(tokens_of(state)), intermediates

    def _embedded(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images)))), None


class MergingVisionTransformerDistilled(MergingVisionTransformer, VisionTransformerDistilled):
    """A patched ``VisionTransformerDistilled``."""


MODELS: dict[type[nn.Module], type[nn.Module]] = {
    VisionTransformer: MergingVisionTransformer,
    VisionTransformerDistilled: MergingVisionTransformerDistilled,
}
