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
    """A patched ``Eva``; rotary positions follow the tokens.

    A merged token is rotated by the size-weighted mean of the rotations of its patches: the mean of their sines and of
    their cosines, not scaled back to length 1. Its logits are then the means of those that each patch would have with
    the merged query or key, and frequencies that turn far between its patches count less. That takes no more than the
    tables, so it holds for axial and mixed positions, however timm made them, and with patch dropout. Prefix tokens are
    not rotated. Pairs are matched, and guides read, by rotated keys.

    Measured on 6 models of 4 blocks with rotary positions alone (``rope_type`` cat, dinov3 and mixed, two seeds each;
    8 by 8 patches, 250 training steps) that say in which of 8 directions one square of 2 or 3 patches lies from
    another; then 32 of 64 patches merge, in block 2 or spread over blocks 1 to 3. Accuracy on 1024 images, and how far
    the probabilities move from those without merging (mean Euclidean distance):

    | rotation of a merged token     | accuracy (0.897 unmerged) | moved by         |
    |--------------------------------|---------------------------|------------------|
    | mean rotation                  | 0.887, 0.891              | 0.059, 0.047     |
    | rotation at the mean position  | 0.884, 0.890              | 0.064, 0.049     |
    | position of the kept token     | 0.860, 0.869              | 0.097, 0.095     |
    | mean rotation, unrotated match | 0.882, 0.891              | 0.065, 0.054     |

    Where one square is to be placed in a grid of 4 by 4 (3 models, 1.000 unmerged), the first three are equal, 0.983 to
    0.985 and 0.985 to 0.989, and matching by unrotated keys is worse, 0.978 and 0.950.
    """

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
