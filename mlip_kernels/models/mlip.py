"""The MLIP-style model: two towers, a Frequency Stage, and token merging guided by both domains.

It keeps open_clip's surface (``encode_image``, ``encode_text``, ``logit_scale``), so that evaluation code written for
CLIP runs on it unchanged; at evaluation the image feature is the spatial one, as in CLIP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import Compose

from mlip_kernels._arguments import (
    check_flag,
    check_integer,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from mlip_kernels.data.batch import VOCABULARY, tokenize
from mlip_kernels.merging import keep_rate_schedule, merge_layers
from mlip_kernels.models.config import MLIPConfig
from mlip_kernels.models.features import GlobalPair, MLIPFeatures, TokenPair
from mlip_kernels.models.folder import read_pretrained, save_pretrained
from mlip_kernels.models.image_tower import Companion, ImageTokens, ImageTower
from mlip_kernels.models.preprocessing import Preprocessing
from mlip_kernels.nn.merging_blocks import Amount
from mlip_kernels.nn.pooling import AttentionPool
from mlip_kernels.nn.spectral import FrequencyStage
from mlip_kernels.spectral import amplitude_phase, token_energy

MAXIMUM_SCALE = 100.0
"""Upper bound of every learned logit scale, as in CLIP."""


def _learned_scale(temperature: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(math.log(1 / temperature)))


class MLIP(nn.Module):
    """CLIP with supervision in two domains and on two levels, and with guided token merging.

    With the frequency and token terms at weight 0 and ``keep_rate`` 1 it holds the parameters of CLIP, no others, and
    computes CLIP's features bit for bit.

    Args:
        config: every choice of the reconstruction; parts that no term needs are not built.
        preprocessing: how pictures become the images that the model takes; by default CLIP's way, which the trainer
            evaluates with.
    """

    def __init__(self, config: MLIPConfig, preprocessing: Preprocessing | None = None) -> None:
        super().__init__()
        if not isinstance(config, MLIPConfig):
            raise TypeError(f"config: expected MLIPConfig, got {type(config).__name__}")
        self.config = config
        self.preprocessing = Preprocessing(config.image.image_size) if preprocessing is None else preprocessing
        if not isinstance(self.preprocessing, Preprocessing):
            raise TypeError(f"preprocessing: expected Preprocessing or None, got {type(preprocessing).__name__}")
        if self.preprocessing.size != config.image.image_size:
            raise ValueError(
                f"preprocessing: expected size={config.image.image_size}, the image size of config, "
                f"got {self.preprocessing.size}"
            )
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
            act_layer=QuickGELU if text.activation == "quick_gelu" else nn.GELU,
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

        self.merge_amounts()

    @property
    def preprocess(self) -> Compose:
        """The torchvision transform of a Pillow picture to float32 ``[3, image_size, image_size]``, without a batch."""
        return self.preprocessing.transform()

    def tokenize(self, captions: str | Sequence[str]) -> Tensor:
        """What `encode_text` takes of captions: CLIP's byte-pair tokens, int64 ``[len(captions), context_length]``.

        Each row is start of text, the caption, end of text, then zeros. A longer caption is cut, its end of text kept.

        Raises:
            TypeError: if ``captions`` is neither a string nor a sequence of strings.
            ValueError: if the text tower has another vocabulary than CLIP's.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        for place, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise TypeError(f"captions[{place}]: expected a string, got {type(caption).__name__}")
        if self.config.text.vocabulary < VOCABULARY:
            raise ValueError(
                f"TextConfig.vocabulary: CLIP's tokenizer has {VOCABULARY} entries, but the text tower only "
                f"{self.config.text.vocabulary}; tokenize with what it was trained on"
            )
        return tokenize(captions, self.config.text.context_length)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the model to ``folder``: ``config.json`` and ``model.safetensors``, for `from_pretrained`.

        ``config.json`` holds the whole configuration, the preprocessing and which tokenizer it is.

        Returns:
            The folder, which is made where it is not there.

        Raises:
            OSError: if a file cannot be written; names it.
        """
        return save_pretrained(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MLIP:
        """The model that `save_pretrained` wrote to ``folder``, bit for bit, on the CPU and in evaluation mode.

        Raises:
            FileNotFoundError: if ``folder`` or a file of it is not there.
            ValueError: if a file does not hold what this version reads; names the file and the reason.
        """
        return read_pretrained(cls, Path(folder))

    def lock_image_tower(self, unlocked_groups: int = 0) -> None:
        """Leave the image tower and its projection as they are in training, as open_clip's method does.

        Args:
            unlocked_groups: how many groups to train all the same, from the end: the projection, the last block with
                the norm, the other blocks one by one, the embedding. The Frequency Stage is trained in any case.
        """
        trunk = self.visual.trunk
        *blocks, last = trunk.blocks
        embedding = [trunk.patch_embed, trunk.cls_token, trunk.pos_embed, trunk.norm_pre]
        groups: list[list[Any]] = [
            embedding,
            *([block] for block in blocks),
            [last, trunk.norm],
            [self.visual_projection],
        ]
        locked = len(groups) - check_integer("unlocked_groups", unlocked_groups, minimum=0)
        for place, group in enumerate(groups):
            for part in group:
                part.requires_grad_(place >= locked)

    def lock_text_tower(self, unlocked_layers: int = 0) -> None:
        """Leave the text tower as it is in training, as open_clip's method does.

        Args:
            unlocked_layers: how many groups to train all the same, from the end: the projection, the last block with
                the norm, the other blocks one by one, the embedding.
        """
        self.text.lock(check_integer("unlocked_layers", unlocked_layers, minimum=0))

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

    def merge_amounts(self, step: int | None = None) -> list[Amount]:
        """What every block merges: how many tokens, or by which shares.

        Args:
            step: training step, for the warm-up of the keep rate; ``None`` means that warm-up is over. At evaluation
                ``test_keep_rate`` holds instead, where it is set.
        """
        if step is not None:
            step = check_integer("step", step, minimum=0)
        merging, depth = self.config.merging, self.config.image.depth
        layers = merge_layers(depth) if merging.layers is None else merging.layers
        if merging.granularity == "three_way":
            return [merging.shares if block in layers else 0 for block in range(depth)]
        keep_rate = merging.keep_rate
        if not self.training and merging.test_keep_rate is not None:
            keep_rate = merging.test_keep_rate
        elif self.training and step is not None and step < merging.warmup_steps:
            keep_rate += (1 - keep_rate) * (1 + math.cos(math.pi * step / merging.warmup_steps)) / 2
        tokens = self.config.image.grid[0] * self.config.image.grid[1]
        return list(keep_rate_schedule(keep_rate, tokens, depth, layers=layers, overall=merging.overall))

    def encode_image_tokens(
        self, images: Tensor, step: int | None = None, *, supervised: bool = True
    ) -> tuple[ImageTokens, Tensor | None]:
        """The image tower's tokens, and the frequency tokens of the full grid ``[B, H·W, D]`` (or ``None``).

        Args:
            images: ``[B, 3, image_size, image_size]``.
            step: training step, for the warm-up of the keep rate.
            supervised: compute the frequency tokens for the loss terms, also where the image tower itself does not
                read them.
        """
        self._check_images(images)
        amounts = self.merge_amounts(step)
        frequency, merging = self.config.frequency, self.config.merging
        embedded = self.visual.embed(images)
        patches = embedded[:, 1:]
        frequency_tokens = pooled = energy = None
        feeds_tower = frequency.order == "sequential" or frequency.fusion == "residual"
        needed = supervised or feeds_tower or merging.needs_frequency_tokens
        if self.frequency_stage is not None and needed:
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
        return self.visual(embedded, companion, amounts), frequency_tokens

    def _pool_frequency(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1) if self.frequency_pool is None else self.frequency_pool(tokens)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Global image feature ``[B, embed_dim]`` for retrieval and zero-shot use, as open_clip's method."""
        normalize = check_flag("normalize", normalize)
        feature = self.visual_projection(self.encode_image_tokens(images, supervised=False)[0].feature)
        return F.normalize(feature, dim=-1) if normalize else feature

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Global text feature ``[B, embed_dim]`` of token ids ``[B, context_length]``, as open_clip's method."""
        normalize = check_flag("normalize", normalize)
        self._check_text(text)
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
        self._check_images(images)
        self._check_text(text)
        if images.shape[0] != text.shape[0]:
            raise ValueError(f"text: expected {images.shape[0]} captions (one an image), got {text.shape[0]}")
        encoded, frequency_tokens = self.encode_image_tokens(images, step)
        text_feature, text_tokens = self.text(text)
        text_feature, mask = self._unit(text_feature), self.text_mask(text)
        image_feature = self._unit(self.visual_projection(encoded.feature))
        pairs = {"global_spatial": GlobalPair(image_feature, text_feature, self.logit_scale.exp())}

        image_frequency, frequency = None, self.config.frequency
        if frequency_tokens is not None and frequency.representation == "amplitude":
            frequency_tokens = amplitude_phase(frequency_tokens, grid=self.visual.grid)[0].flatten(1, -2).log1p()
        frequency_text_feature, frequency_text_tokens = text_feature, text_tokens
        if self.text_frequency_stage is not None:
            frequency_text_tokens = self.text_frequency_stage(text_tokens * mask[..., None])
        if self.config.loss.frequency_feature and frequency_tokens is not None:
            image_frequency = self._unit(self.frequency_projection(self._pool_frequency(frequency_tokens)))
        if self.config.loss.frequency_weight > 0 and image_frequency is not None:
            if self.text_frequency_stage is not None:
                frequency_text_feature = self._pool_text(frequency_text_tokens, mask)
            scale = self.logit_scale_frequency.exp()
            pairs["global_frequency"] = GlobalPair(image_frequency, frequency_text_feature, scale)

        if frequency.representation == "tokens":
            frequency_tokens = encoded.frequency_tokens
        token_pairs = self._token_pairs(encoded, frequency_tokens, text_tokens, frequency_text_tokens, mask)
        return MLIPFeatures(pairs, token_pairs, image_frequency)

    def _token_pairs(
        self,
        encoded: ImageTokens,
        frequency_tokens: Tensor | None,
        text_tokens: Tensor,
        frequency_text_tokens: Tensor,
        mask: Tensor,
    ) -> dict[str, TokenPair]:
        """The token-level terms that the configuration asks for."""
        loss = self.config.loss
        token_pairs: dict[str, TokenPair] = {}
        weight = encoded.size if loss.weigh_by_size else None
        text: Tensor | None = None
        if loss.spatial_tokens:
            image = self._unit_tokens(self.image_token_projection(encoded.tokens))
            text = self._unit_tokens(self.text_token_projection(text_tokens))
            token_pairs["token_spatial"] = TokenPair(image, text, self.logit_scale_tokens.exp(), weight, mask)
        if loss.frequency_tokens and frequency_tokens is not None:
            # Amplitudes are of the full grid: only tokens after the inverse transform are merged with the patches.
            weight = weight if self.config.frequency.representation == "tokens" else None
            image = self._unit_tokens(self.frequency_token_projection(frequency_tokens))
            if loss.token_domains == "union":
                return {"token_union": self._union(token_pairs["token_spatial"], image, weight)}
            if text is None or self.text_frequency_stage is not None:
                text = self._unit_tokens(self.text_token_projection(frequency_text_tokens))
            scale = self.logit_scale_frequency_tokens.exp()
            token_pairs["token_frequency"] = TokenPair(image, text, scale, weight, mask)
        return token_pairs

    @staticmethod
    def _union(spatial: TokenPair, frequency: Tensor, frequency_weight: Tensor | None) -> TokenPair:
        """The tokens of both domains side by side, each image's frequency tokens after its spatial ones."""
        weights = [
            tokens.new_ones(tokens.shape[:2], dtype=torch.float32) if weight is None else weight
            for tokens, weight in ((spatial.image, spatial.image_weight), (frequency, frequency_weight))
        ]
        return spatial._replace(
            image=torch.cat([spatial.image, frequency], dim=1), image_weight=torch.cat(weights, dim=1)
        )

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
        return self._unit(self.text.ln_final(mean) @ self.text.text_projection)

    def _check_images(self, images: object) -> None:
        side = self.config.image.image_size
        checked = check_tensor("images", images, layout=f"[B, 3, {side}, {side}]")
        check_shape("images", checked, [checked.shape[0], 3, side, side], f"[B, 3, {side}, {side}]")
        check_same_device("images", checked, "the model", self.logit_scale)
        check_same_dtype("images", checked, "the model", self.visual_projection.weight)

    def _check_text(self, text: object) -> None:
        length = self.config.text.context_length
        layout = f"[B, context_length = {length}]"
        checked = check_tensor("text", text, layout=layout, dtypes=(torch.int64, torch.int32))
        check_shape("text", checked, [checked.shape[0], length], layout)
        check_same_device("text", checked, "the model", self.logit_scale)
