"""Vision encoders of Hugging Face's CLIP, SigLIP and SigLIP 2 with layers that merge.

The three have the same modules under names of their own: an encoder around layers of attention and MLP. What merges is
written once and mixed into each. Layers keep the names of their classes, by which ``device_map`` and FSDP find what is
not to be split. No ``PreTrainedModel`` changes its class, so ``save_pretrained`` writes the architecture that was
loaded.

The encoder takes and returns one token for every patch. Attention of layers that merge, or whose tokens have merged,
is `mlip_kernels.proportional_attention`, whatever ``attn_implementation`` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip import modeling_clip as clip
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.siglip2 import modeling_siglip2 as siglip2
from transformers.utils.output_capturing import _active_collector

from mlip_kernels.merging import MergePlan, proportional_attention
from mlip_kernels.nn.attention import Attending
from mlip_kernels.nn.merging_blocks import MergeState, MergeStep
from mlip_kernels.patch.settings import Merging
from mlip_kernels.patch.states import block_states, known, tokens_of


class _Attention(nn.Module):
    head_dim: Any
    scale: Any
    dropout: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    out_proj: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        merging: Attending | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The module's own forward; with ``merging``, attention by the sizes of its tokens."""
        if merging is None:
            return super().forward(hidden_states, attention_mask, **options)
        query, keys, values = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = proportional_attention(
            query,
            keys,
            values,
            merging.attention_size,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            padding=merging.padding,
        )
        merging.attended(query[:, :, 0].detach(), keys.detach())
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


class _Layer(nn.Module):
    self_attn: Any
    mlp: Any
    layer_norm1: Any
    layer_norm2: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        merging: MergeStep | None = None,
        **options: Any,
    ) -> Tensor:
        """The module's own forward; with a step, ``[B, N', D]``: it merges tokens between attention and MLP."""
        if merging is None:
            return super().forward(hidden_states, attention_mask, **options)
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), merging=merging)
        hidden_states = merging.merge(hidden_states + attended)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class _Encoder(nn.Module):
    layers: Any
    prefix_tokens = 0
    """Class tokens before the patches."""
    merging: Merging
    grid: tuple[int, int] | None
    """Patches in a column and in a row of the images that the model takes; ``None`` where every image has its own."""

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **options: Any) -> BaseModelOutput:
        """The module's own forward: every patch has the token it has merged into."""
        return BaseModelOutput(last_hidden_state=tokens_of(self._last(inputs_embeds, attention_mask, options)))

    def forward_merged(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None, MergePlan | None]:
        """Tokens ``[B, N', D]``, the patches each stands for ``[B, N']``, and the plan that leads to them."""
        state = self._last(inputs_embeds, attention_mask, options)
        return state.tokens, state.size, state.plan

    def _last(self, tokens: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> MergeState:
        """The state behind the last layer. Hidden states that are being captured get a token for every patch."""
        state = MergeState(tokens)
        captured = (_active_collector.get() or {}).get("hidden_states")
        for state in self._states(tokens, attention_mask, options):
            if captured and captured[-1] is state.tokens:
                captured[-1] = tokens_of(state)
        return state

    def _states(self, tokens: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> Iterator[MergeState]:
        merging, depth, mask = self.merging, len(self.layers), None
        patches = known(tokens.shape[1]) - self.prefix_tokens
        schedule = [0] * depth
        if self.training or not merging.training_only:
            schedule = merging.schedule(depth, patches)
        if any(schedule):
            mask = _real_tokens(attention_mask, tokens)
            if "attentions" in (_active_collector.get() or {}):
                raise ValueError(
                    "output_attentions: expected False while tokens merge, since attention is between merged tokens"
                )
        grid = self.grid
        return block_states(
            self.layers,
            tokens,
            schedule,
            merging,
            prefix_tokens=self.prefix_tokens,
            class_token=self.prefix_tokens > 0,
            grid=grid if grid is not None and grid[0] * grid[1] == patches else None,
            mask=mask,
            attention_mask=attention_mask,
            **options,
        )


def _real_tokens(attention_mask: Any, tokens: Tensor) -> Tensor | None:
    """``[B, N]``, True for real tokens, from what ``create_bidirectional_mask`` makes of a padding mask."""
    if attention_mask is None:
        return None
    batch, count, _ = tokens.shape
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"attention_mask: expected a tensor while tokens merge, got {type(attention_mask).__name__}; load the model"
            " with attn_implementation='sdpa'"
        )
    if attention_mask.dim() == 4:
        attention_mask = attention_mask[:, 0, 0]  # padding is the same for all queries
        real = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    else:
        real = attention_mask != 0
    if real.shape[-1] != count or real.shape[0] not in (1, batch):
        raise ValueError(f"attention_mask: expected [B, N] = [{batch}, {count}] keys, got shape {list(real.shape)}")
    return real.expand(batch, count)


class CLIPAttention(_Attention, clip.CLIPAttention):
    """CLIP's attention, by size where a merge says so."""


class CLIPEncoderLayer(_Layer, clip.CLIPEncoderLayer):
    """CLIP's layer, with a merge between attention and MLP."""


class CLIPEncoder(_Encoder, clip.CLIPEncoder):
    """CLIP's encoder of images."""

    prefix_tokens = 1


class SiglipAttention(_Attention, siglip.SiglipAttention):
    """SigLIP's attention, by size where a merge says so."""


class SiglipEncoderLayer(_Layer, siglip.SiglipEncoderLayer):
    """SigLIP's layer, with a merge between attention and MLP."""


class SiglipEncoder(_Encoder, siglip.SiglipEncoder):
    """SigLIP's encoder of images."""


class Siglip2Attention(_Attention, siglip2.Siglip2Attention):
    """SigLIP 2's attention, by size where a merge says so."""


class Siglip2EncoderLayer(_Layer, siglip2.Siglip2EncoderLayer):
    """SigLIP 2's layer, with a merge between attention and MLP."""


class Siglip2Encoder(_Encoder, siglip2.Siglip2Encoder):
    """SigLIP 2's encoder of images."""


class _Embeddings(nn.Module):
    image_size: Any
    reads_grid: bool

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """The module's own forward; refuses images of another size where a guide reads the grid."""
        size = tuple(pixel_values.shape[-2:])
        if self.reads_grid and interpolate_pos_encoding and size != (self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values: expected {self.image_size} x {self.image_size} pixels where the guide reads"
                f" frequencies, got {size[0]} x {size[1]}; choose another guide for interpolate_pos_encoding"
            )
        return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)


class CLIPVisionEmbeddings(_Embeddings, clip.CLIPVisionEmbeddings):
    """CLIP's embeddings of images, which know whether a guide reads the grid."""


class SiglipVisionEmbeddings(_Embeddings, siglip.SiglipVisionEmbeddings):
    """SigLIP's embeddings of images, which know whether a guide reads the grid."""


MODELS: tuple[type[nn.Module], ...] = (clip.CLIPVisionModel, siglip.SiglipVisionModel, siglip2.Siglip2VisionModel)
ATTENTIONS: dict[type[nn.Module], type[nn.Module]] = {
    clip.CLIPAttention: CLIPAttention,
    siglip.SiglipAttention: SiglipAttention,
    siglip2.Siglip2Attention: Siglip2Attention,
}
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    clip.CLIPEncoderLayer: CLIPEncoderLayer,
    siglip.SiglipEncoderLayer: SiglipEncoderLayer,
    siglip2.Siglip2EncoderLayer: Siglip2EncoderLayer,
}
ENCODERS: dict[type[nn.Module], type[nn.Module]] = {
    clip.CLIPEncoder: CLIPEncoder,
    siglip.SiglipEncoder: SiglipEncoder,
    siglip2.Siglip2Encoder: Siglip2Encoder,
}
EMBEDDINGS: dict[type[nn.Module], type[nn.Module]] = {
    clip.CLIPVisionEmbeddings: CLIPVisionEmbeddings,
    siglip.SiglipVisionEmbeddings: SiglipVisionEmbeddings,
}
