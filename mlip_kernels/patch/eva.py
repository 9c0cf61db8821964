"""timm's ``Eva`` (EVA, EVA-02, DINOv3, Perception Encoder) with blocks that merge, by `mlip_kernels.patch.timm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models.eva import Eva
from torch import Tensor, nn

from mlip_kernels.nn.merging_blocks import MergeState, last_state
from mlip_kernels.patch.merging_model import MergingModel
from mlip_kernels.patch.rotary import RotaryTables
from mlip_kernels.patch.states import Merged, tokens_of


class MergingEva(MergingModel, Eva):
    """A patched ``Eva``; rotary positions follow the tokens (`RotaryTables`)."""

    def forward_blocks(
        self,
        tokens: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        rope: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Merged:
        """The blocks alone, for code that embeds images, or adds tokens of its own, and normalises what comes out.

        Args:
            tokens: ``[B, N, D]``, what the first block takes: prefix tokens, then patches.
            attn_mask: as in `forward`.
            is_causal: as in `forward`.
            rope: the rotary positions of the patches, which ``model._pos_embed`` returns beside tokens.
            grid: patches in a column and in a row, for guides that read it. Default: the model's own, if it fits.

        Returns:
            As `forward_merged`, not normalised.

        Raises:
            ValueError: the model has rotary positions, and none are given.
        """
        if rope is None and self.rope is not None:
            raise ValueError(
                "rope: expected the rotary positions of the patches, got None; "
                "tokens, rope = model._pos_embed(model.patch_embed(images)) has them"
            )
        grid = self._own_grid(tokens) if grid is None else grid
        state = last_state(self._block_states(tokens, grid, attn_mask, is_causal, rope=rope))
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
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As the model's own: every patch has the token it has merged into."""
        patches, prefix, state = self._intermediates(x, indices, norm, stop_early, output_fmt, attn_mask, is_causal)
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        intermediates: list[Any] = list(zip(patches, prefix, strict=True)) if with_prefix else patches
        if intermediates_only:
            return intermediates
        return self.norm(tokens_of(state)), intermediates

    def _embedded(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens, rope = self._pos_embed(self.patch_embed(images))
        return self.norm_pre(tokens), rope

    def _rotary(self, rope: Tensor | None) -> Callable[[int, MergeState], dict[str, Any]] | None:
        each_block = rope is not None and getattr(self, "rope_mixed", False)
        return RotaryTables(rope, each_block=each_block, prefix_tokens=self.num_prefix_tokens)


MODELS: dict[type[nn.Module], type[nn.Module]] = {Eva: MergingEva}
