"""The MLIP-style model: two towers, a Frequency Stage, and token merging guided by both domains.

It keeps open_clip's surface (``encode_image``, ``encode_text``, ``logit_scale``), so that evaluation code written for
CLIP runs on it unchanged; at evaluation the image feature is the spatial one, as in CLIP.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mlip_kernels.models.config import MLIPConfig
from mlip_kernels.models.image_tower import Companion, ImageTokens, ImageTower, MergeStep
from mlip_kernels.nn.pooling import AttentionPool
from mlip_kernels.nn.spectral import FrequencyStage
from mlip_kernels.ops.merging import keep_rate_schedule, merge_layers
from mlip_kernels.ops.spectral import amplitude_phase, token_energy

MAXIMUM_SCALE = 100.0
"""Upper bound of every learned logit scale, as in CLIP."""


class TokenFeatures(NamedTuple):
    """Normalised tokens in the space where images and text are compared token by token."""

    tokens: Tensor
    """``[B, N, token_dim]``, unit length."""
    weight: Tensor | None
    """``[B, N]`` patches that each token stands for, or ``None`` where all count alike."""


class MLIPFeatures(NamedTuple):
    """All that the loss terms read; a part that no term needs is ``None``."""

    image: Tensor
    """``[B, embed_dim]`` spatial image feature, unit length."""
    text: Tensor
    """``[B, embed_dim]`` text feature, unit length."""
    image_frequency: Tensor | None
    """``[B, embed_dim]`` frequency image feature, unit length."""
    text_frequency: Tensor | None
    """``[B, embed_dim]`` text feature of the frequency term: ``text`` itself unless text is transformed too."""
    image_tokens: TokenFeatures | None
    image_frequency_tokens: TokenFeatures | None
    text_tokens: Tensor | None
    """``[B, M, token_dim]``, unit length."""
    text_frequency_tokens: Tensor | None
    text_mask: Tensor | None
    """``[B, M]``, True for text tokens that take part."""
    logit_scale: Tensor
    logit_scale_frequency: Tensor | None
    logit_scale_tokens: Tensor | None
    logit_scale_frequency_tokens: Tensor | None


def _learned_scale(temperature: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(math.log(1 / temperature)))


class MLIP(nn.Module):
    """CLIP with supervision in two domains and on two levels, and with guided token merging.

    With the frequency and token terms at weight 0 and ``keep_rate`` 1 it holds the parameters of CLIP, no others, and
    computes CLIP's features bit for bit.

    Args:
        config: every choice of the reconstruction; parts that no term needs are not built.
    """

    def __init__(self, config: MLIPConfig) -> None:
        super().__init__()
        self.config = config
        image, text, loss, frequency = config.image, config.text, config.loss, config.frequency
        self.visual = ImageTower(image, config.merging)
        self.text = TextTransformer(
            context_length=text.context_length,
            vocab_size=text.vocabulary,
            width=text.width,
            heads=text.heads,
            layers=text.depth,
            output_dim=config.embed_dim,
            output_tokens=True,
        )
        self.visual_projection = nn.Linear(image.width, config.embed_dim, bias=False)
        self.logit_scale = _learned_scale(loss.temperature)

        self.frequency_stage = self.frequency_pool = None
        if config.has_frequency_stage:
            self.frequency_stage = FrequencyStage(
                image.width,
                image.grid,
                depth=frequency.depth,
                transform=frequency.transform,
                basis=frequency.basis,
                mixer=frequency.mixer,
                filters=frequency.filters,
                mlp_ratio=frequency.mlp_ratio,
            )
            self.frequency_norm = nn.LayerNorm(image.width)
        if loss.frequency_feature:
            if frequency.pool == "attention":
                self.frequency_pool = AttentionPool(image.width)
            self.frequency_projection = nn.Linear(image.width, config.embed_dim, bias=False)
        if loss.frequency_weight > 0:
            self.logit_scale_frequency = _learned_scale(loss.temperature)

        if loss.spatial_tokens or loss.frequency_tokens:
            self.text_token_projection = nn.Linear(text.width, loss.token_dim, bias=False)
        if loss.spatial_tokens:
            self.image_token_projection = nn.Linear(image.width, loss.token_dim, bias=False)
            self.logit_scale_tokens = _learned_scale(loss.temperature)
        if loss.frequency_tokens:
            self.frequency_token_projection = nn.Linear(image.width, loss.token_dim, bias=False)
            if loss.token_domains != "union":
                self.logit_scale_frequency_tokens = _learned_scale(loss.temperature)

        self.text_frequency_stage = None
        if config.transforms_text:
            self.text_frequency_stage = FrequencyStage(
                text.width, (1, text.context_length), depth=1, transform="tokens", mlp_ratio=frequency.mlp_ratio
            )

        self.merge_steps()

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: recompute the blocks of every tower in the backward pass."""
        self.visual.gradient_checkpointing = enable
        self.text.set_grad_checkpointing(enable)
        if self.frequency_stage is not None:
            self.frequency_stage.gradient_checkpointing = enable

    @torch.no_grad()
    def clamp_logit_scales(self) -> None:
        """Keep every learned scale in [1, 100]; to be called after each optimiser step, as CLIP does."""
        for name, parameter in self.named_parameters():
            if name.startswith("logit_scale"):
                parameter.clamp_(0.0, math.log(MAXIMUM_SCALE))

    def merge_steps(self, step: int | None = None) -> list[MergeStep | None]:
        """What every block merges.

        Args:
            step: training step, for the warm-up of the keep rate; ``None`` means that warm-up is over. At evaluation
                ``test_keep_rate`` holds instead, where it is set.
        """
        merging, depth = self.config.merging, self.config.image.depth
        layers = merge_layers(depth) if merging.layers is None else merging.layers
        steps: list[MergeStep | None] = [None] * depth
        if merging.granularity == "three_way":
            for layer in layers:
                steps[layer] = MergeStep(removed=0, shares=merging.shares)
            return steps
        keep_rate = merging.keep_rate
        if not self.training and merging.test_keep_rate is not None:
            keep_rate = merging.test_keep_rate
        elif self.training and step is not None and step < merging.warmup_steps:
            keep_rate += (1 - keep_rate) * (1 + math.cos(math.pi * step / merging.warmup_steps)) / 2
        tokens = self.config.image.grid[0] * self.config.image.grid[1]
        schedule = keep_rate_schedule(keep_rate, tokens, depth, layers=layers, overall=merging.overall)
        for block, removed in enumerate(schedule):
            if removed:
                steps[block] = MergeStep(removed=removed, shares=None)
        return steps

    def encode_image_tokens(self, images: Tensor, step: int | None = None) -> tuple[ImageTokens, Tensor | None]:
        """The image tower's tokens, and the frequency tokens of the full grid ``[B, H·W, D]`` (or ``None``).

        Args:
            images: ``[B, 3, image_size, image_size]``.
            step: training step, for the warm-up of the keep rate.
        """
        frequency, merging = self.config.frequency, self.config.merging
        embedded = self.visual.embed(images)
        patches = embedded[:, 1:]
        frequency_tokens = pooled = energy = None
        if self.frequency_stage is not None and self._frequency_needed:
            frequency_tokens = self.frequency_norm(self.frequency_stage(patches))
            pooled = self._pool_frequency(frequency_tokens)
            if frequency.order == "sequential":
                embedded = torch.cat([embedded[:, :1], frequency_tokens], dim=1)
            elif frequency.fusion == "residual":
                embedded = torch.cat([embedded[:, :1], patches + frequency_tokens], dim=1)
        if merging.active and merging.frequency_guide == "energy" and merging.guide in ("frequency", "both"):
            with torch.no_grad():
                energy = token_energy(patches, merging.energy_cutoff, grid=self.visual.grid)
        companion = Companion(tokens=frequency_tokens, pooled=pooled, energy=energy)
        return self.visual(embedded, companion, self.merge_steps(step)), frequency_tokens

    @property
    def _frequency_needed(self) -> bool:
        """Training terms need the Frequency Stage; at evaluation only the spatial feature and its guide count."""
        feeds_tower = self.config.frequency.order == "sequential" or self.config.frequency.fusion == "residual"
        return self.training or feeds_tower or self.config.merging.needs_frequency_tokens

    def _pool_frequency(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1) if self.frequency_pool is None else self.frequency_pool(tokens)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Global image feature ``[B, embed_dim]`` for retrieval and zero-shot use, as open_clip's method."""
        feature = self.visual_projection(self.encode_image_tokens(images)[0].feature)
        return F.normalize(feature, dim=-1) if normalize else feature

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Global text feature ``[B, embed_dim]`` of token ids ``[B, context_length]``, as open_clip's method."""
        feature = self.text(text)[0]
        return F.normalize(feature, dim=-1) if normalize else feature

    def text_mask(self, text: Tensor) -> Tensor:
        """Which text tokens take part in token-level terms, ``[B, context_length]`` booleans.

        The end token has the largest id, and 0 both pads and spells "!", so the end is found, not the padding.
        """
        place = torch.arange(text.shape[1], device=text.device)
        end = text.argmax(-1, keepdim=True)
        choice = self.config.loss.text_tokens
        if choice == "words":
            return (place > 0) & (place < end)
        if choice == "words_and_end":
            return (place > 0) & (place <= end)
        return place <= end

    def forward(self, images: Tensor, text: Tensor, step: int | None = None) -> MLIPFeatures:
        """Features of a batch of pairs, for `MLIPLoss`.

        Args:
            images: ``[B, 3, image_size, image_size]``, normalised as CLIP's.
            text: ``[B, context_length]`` int64 from CLIP's tokenizer.
            step: training step, for the warm-up of the keep rate.

        Raises:
            ValueError: if a shape does not fit the configuration or the batches differ.
            TypeError: if ``text`` does not hold integers.
        """
        self._check(images, text)
        config, loss = self.config, self.config.loss
        encoded, frequency_tokens = self.encode_image_tokens(images, step)
        text_feature, text_tokens = self.text(text)
        mask = self.text_mask(text)
        text_frequency_feature, text_frequency_tokens = text_feature, text_tokens
        if self.text_frequency_stage is not None:
            text_frequency_tokens = self.text_frequency_stage(text_tokens * mask[..., None])
            if loss.frequency_weight > 0:
                text_frequency_feature = self._pool_text(text_frequency_tokens, mask)

        supervised = frequency_tokens
        if frequency_tokens is not None and config.frequency.representation == "amplitude":
            supervised = amplitude_phase(frequency_tokens, grid=self.visual.grid)[0].flatten(1, -2).log1p()
        weight = encoded.size if loss.weigh_by_size else None

        frequency_feature = image_tokens = image_frequency_tokens = None
        if loss.frequency_feature:
            frequency_feature = self._unit(self.frequency_projection(self._pool_frequency(supervised)))
        if loss.spatial_tokens:
            image_tokens = TokenFeatures(self._unit_tokens(self.image_token_projection(encoded.tokens)), weight)
        if loss.frequency_tokens:
            merged = config.frequency.representation == "tokens"
            tokens = encoded.companion.tokens if merged else supervised
            projected = self._unit_tokens(self.frequency_token_projection(tokens))
            image_frequency_tokens = TokenFeatures(projected, weight if merged else None)
        text_words = text_frequency_words = None
        if loss.spatial_tokens or loss.frequency_tokens:
            text_words = text_frequency_words = self._unit_tokens(self.text_token_projection(text_tokens))
            if self.text_frequency_stage is not None:
                text_frequency_words = self._unit_tokens(self.text_token_projection(text_frequency_tokens))
        return MLIPFeatures(
            image=self._unit(self.visual_projection(encoded.feature)),
            text=self._unit(text_feature),
            image_frequency=frequency_feature,
            text_frequency=self._unit(text_frequency_feature) if loss.frequency_weight > 0 else None,
            image_tokens=image_tokens,
            image_frequency_tokens=image_frequency_tokens,
            text_tokens=text_words,
            text_frequency_tokens=text_frequency_words if loss.frequency_tokens else None,
            text_mask=mask,
            logit_scale=self.logit_scale.exp(),
            logit_scale_frequency=self._scale("logit_scale_frequency"),
            logit_scale_tokens=self._scale("logit_scale_tokens"),
            logit_scale_frequency_tokens=self._scale("logit_scale_frequency_tokens"),
        )

    def _scale(self, name: str) -> Tensor | None:
        parameter = getattr(self, name, None)
        return None if parameter is None else parameter.exp()

    @staticmethod
    def _unit(feature: Tensor) -> Tensor:
        return F.normalize(feature.to(torch.promote_types(feature.dtype, torch.float32)), dim=-1)

    @staticmethod
    def _unit_tokens(tokens: Tensor) -> Tensor:
        """Unit length, computed in float32 and kept in the dtype of the projection, half under autocast."""
        return MLIP._unit(tokens).to(tokens.dtype)

    def _pool_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Mean of the frequency-filtered text tokens in the embedding space of the text tower."""
        mean = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return self.text.ln_final(mean) @ self.text.text_projection

    def _check(self, images: Tensor, text: Tensor) -> None:
        side = self.config.image.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"images: expected [B, 3, {side}, {side}], got shape {list(images.shape)}")
        if text.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"text: expected int64 token ids, got {str(text.dtype).removeprefix('torch.')}")
        if text.dim() != 2 or text.shape[1] != self.config.text.context_length:
            length = self.config.text.context_length
            raise ValueError(f"text: expected [B, context_length = {length}], got shape {list(text.shape)}")
        if images.shape[0] != text.shape[0]:
            raise ValueError(f"text: expected {images.shape[0]} captions (one an image), got {text.shape[0]}")
