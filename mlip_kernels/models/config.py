"""One typed configuration of an MLIP-style model: every open choice of the reconstruction is a field.

Only the abstract of MLIP (arXiv 2406.01460) fixes the idea: contrastive supervision in the spatial and the frequency
domain, globally and per token, and token merging guided by both domains. What it leaves open is decided here by
default and can be switched. The defaults describe a ViT-B/16 at 224 pixels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mlip_kernels._arguments import (
    LARGEST_SIZE,
    check_choice,
    check_flag,
    check_integer,
    check_integers,
    check_number,
)
from mlip_kernels.nn.granularity import check_shares

Activation = Literal["gelu", "quick_gelu"]


def _check_literals(config: Any) -> None:
    """Raise unless every ``Literal`` field of a dataclass holds one of its choices."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            check_choice(f"{type(config).__name__}.{name}", getattr(config, name), get_args(hint))


def _check_counts(config: Any, *names: str, minimum: int = 1) -> None:
    for name in names:
        value = check_integer(_path(config, name), getattr(config, name), minimum=minimum, maximum=LARGEST_SIZE)
        object.__setattr__(config, name, value)  # as Python's own, whatever it came as: it goes into checkpoints


def _check_number(config: Any, name: str, **limits: float) -> None:
    object.__setattr__(config, name, check_number(_path(config, name), getattr(config, name), **limits))


def _check_flags(config: Any, *names: str) -> None:
    for name in names:
        object.__setattr__(config, name, check_flag(_path(config, name), getattr(config, name)))


def _path(config: Any, name: str) -> str:
    return f"{type(config).__name__}.{name}"


@dataclass(frozen=True)
class ImageConfig:
    """The image tower: a timm ``VisionTransformer`` with a class token."""

    image_size: int = 224
    """Side of the square input, in pixels."""
    patch_size: int = 16
    """Side of a patch, in pixels; it divides the image size."""
    width: int = 768
    """Channels of a token."""
    depth: int = 12
    """Transformer blocks."""
    heads: int = 12
    """Attention heads; they divide the width."""
    mlp_ratio: float = 4.0
    """Hidden channels of a block's MLP, relative to the width."""
    drop_path: float = 0.0
    """Stochastic depth of the last block, rising linearly from 0."""
    pool: Literal["token", "avg"] = "token"
    """Global image feature: the class token, or the mean of the patches weighted by how many each stands for."""
    pre_norm: bool = False
    """A norm in front of the blocks and patches without a bias, as CLIP's own image tower has it."""
    norm_epsilon: float = 1e-6
    """Added to the variance in every norm; 1e-5 in CLIP's own image tower."""
    activation: Activation = "gelu"
    """Of the MLPs; OpenAI's models have ``x·sigmoid(1.702 x)``, the quick one."""

    def __post_init__(self) -> None:
        _check_literals(self)
        _check_counts(self, "image_size", "patch_size", "width", "depth", "heads")
        _check_flags(self, "pre_norm")
        _check_number(self, "norm_epsilon", minimum=0.0)
        _check_number(self, "mlp_ratio", minimum=0.1, maximum=LARGEST_SIZE / self.width)
        _check_number(self, "drop_path", minimum=0.0, maximum=0.99)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"ImageConfig.patch_size: expected a divisor of image_size={self.image_size}, got {self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"ImageConfig.heads: expected a divisor of width={self.width}, got {self.heads}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in height and in width."""
        side = self.image_size // self.patch_size
        return side, side


@dataclass(frozen=True)
class TextConfig:
    """The text tower: CLIP's causal transformer over CLIP's byte-pair tokens, as open_clip builds it."""

    context_length: int = 77
    """Text tokens of a caption, start and end included; longer captions are cut."""
    vocabulary: int = 49408
    """Entries of the tokenizer."""
    width: int = 512
    """Channels of a token."""
    depth: int = 12
    """Transformer blocks."""
    heads: int = 8
    """Attention heads; they divide the width."""
    activation: Activation = "gelu"
    """Of the MLPs; OpenAI's models have ``x·sigmoid(1.702 x)``, the quick one."""

    def __post_init__(self) -> None:
        _check_literals(self)
        _check_counts(self, "context_length", "vocabulary", "width", "depth", "heads")
        if self.width % self.heads:
            raise ValueError(f"TextConfig.heads: expected a divisor of width={self.width}, got {self.heads}")


@dataclass(frozen=True)
class FrequencyConfig:
    """The Frequency Stage: light spectral blocks on the full patch grid, before anything is merged."""

    depth: int = 2
    """Blocks; each is a spectral mixer and an MLP."""
    transform: Literal["grid", "tokens"] = "grid"
    """Two-dimensional over the patch grid (GFNet), or one-dimensional over the token sequence (Lite-Mind, FSRU)."""
    basis: Literal["rfft", "dct"] = "rfft"
    """Real Fourier transform or cosine transform."""
    mixer: Literal["filter", "filter_bank", "complex_mlp", "none"] = "filter"
    """What happens to the spectrum: one learned filter per channel (GFNet), a bank of them (Lite-Mind), a complex
    linear layer over the channels (FreTS), or nothing (a control of equal cost without frequencies)."""
    filters: int = 4
    """Filters of the bank."""
    mlp_ratio: float = 4.0
    """Hidden channels of a block's MLP, relative to the width."""
    order: Literal["parallel", "sequential"] = "parallel"
    """Beside the image transformer, whose input then stays that of CLIP, or before it: the transformer reads the
    frequency tokens in place of the patch embedding."""
    fusion: Literal["none", "residual"] = "none"
    """Whether the parallel stage's tokens are added to the input of the image transformer."""
    representation: Literal["tokens", "amplitude"] = "tokens"
    """What the frequency terms compare with text: tokens after the inverse transform, or the logarithm of the
    amplitude of each coefficient."""
    pool: Literal["attention", "mean"] = "attention"
    """How the frequency tokens become one feature."""
    text_transform: Literal["none", "rfft"] = "none"
    """Whether the text of the frequency terms passes a one-dimensional frequency block too (FSRU)."""

    def __post_init__(self) -> None:
        _check_literals(self)
        _check_counts(self, "depth", "filters")
        _check_number(self, "mlp_ratio", minimum=0.1, maximum=LARGEST_SIZE)
        if self.mixer in ("filter_bank", "complex_mlp") and self.basis != "rfft":
            raise ValueError(f"FrequencyConfig.basis: expected 'rfft' for mixer={self.mixer!r}, got {self.basis!r}")
        if self.order == "sequential" and self.fusion != "none":
            raise ValueError(f"FrequencyConfig.fusion: expected 'none' for order='sequential', got {self.fusion!r}")


@dataclass(frozen=True)
class MergingConfig:
    """Token merging inside the image tower, between attention and MLP of a few blocks."""

    keep_rate: float = 0.7
    """Share of patch tokens that each merging step keeps; 1 merges nothing."""
    overall: bool = False
    """Read ``keep_rate`` as the share that is left after all steps instead of after each."""
    layers: tuple[int, ...] | None = None
    """Blocks that merge, counted from 0; ``None`` merges at a quarter, a half and three quarters of the depth."""
    guide: Literal["none", "spatial", "frequency", "both"] = "both"
    """Which tokens are informative and merge last: by the attention of the class token, by frequency, by the mean
    of the two rankings, or none of it (ToMe)."""
    frequency_guide: Literal["similarity", "energy"] = "similarity"
    """Frequency semantics of a token: similarity of its frequency token to the pooled one, or its high-frequency
    energy, which needs no Frequency Stage."""
    energy_cutoff: float = 0.25
    """Normalised frequency from which the energy guide counts."""
    guide_weight: float = 1.0
    """Weight of the guide against the cosine similarity in the matching score."""
    proportional_attention: bool = True
    """Add the logarithm of a token's size to its attention logits, so that a merged token counts as its parts."""
    granularity: Literal["sizes", "three_way"] = "sizes"
    """Repeated merging of similar pairs, or three fixed shares per step: informative tokens stay, middling ones merge
    two to one, the rest four to one."""
    shares: tuple[float, float] = (0.5, 0.3)
    """Three-way shares of tokens that stay and that merge two to one; they replace ``keep_rate``."""
    warmup_steps: int = 0
    """Training steps over which the keep rate falls from 1 along a cosine."""
    test_keep_rate: float | None = None
    """Keep rate at evaluation; ``None`` uses that of training."""

    def __post_init__(self) -> None:
        _check_literals(self)
        _check_flags(self, "overall", "proportional_attention")
        for name in ("keep_rate", "test_keep_rate"):
            if name == "keep_rate" or self.test_keep_rate is not None:
                # One step merges at most every second token.
                _check_number(self, name, minimum=1e-3 if self.overall else 0.5, maximum=1.0)
        _check_number(self, "guide_weight", minimum=0.0)
        _check_number(self, "energy_cutoff", minimum=0.0, maximum=1.0)
        _check_counts(self, "warmup_steps", minimum=0)
        if self.layers is not None:
            layers = check_integers("MergingConfig.layers", self.layers, minimum=0, maximum=LARGEST_SIZE)
            if not layers or sorted(set(layers)) != layers:
                raise ValueError(f"MergingConfig.layers: expected rising block numbers or None, got {layers}")
            object.__setattr__(self, "layers", tuple(layers))
        object.__setattr__(self, "shares", check_shares("MergingConfig.shares", self.shares))

    @property
    def active(self) -> bool:
        """Whether any configured stage of training or evaluation merges tokens."""
        return self.granularity == "three_way" or self.keep_rate < 1 or (self.test_keep_rate or 1.0) < 1

    @property
    def needs_frequency_tokens(self) -> bool:
        """Whether the guide reads the tokens of a Frequency Stage."""
        return self.active and self.guide in ("frequency", "both") and self.frequency_guide == "similarity"


@dataclass(frozen=True)
class LossConfig:
    """The contrastive terms: ``L = L_global + frequency·L_global^F + token·(L_token + L_token^F) / 2``."""

    frequency_weight: float = 0.5
    """Weight of the global term in the frequency domain."""
    token_weight: float = 0.5
    """Weight of the token-level terms."""
    token_domains: Literal["separate", "union", "spatial", "frequency"] = "separate"
    """One token term per domain and their mean, one term over the tokens of both, or one domain alone."""
    consistency_weight: float = 0.0
    """Weight of ``1 − cos`` between the spatial and the frequency feature of an image."""
    token_dim: int = 256
    """Channels in which image and text tokens are compared."""
    text_tokens: Literal["words", "words_and_end", "all"] = "words_and_end"
    """Text tokens that take part: between start and end, with the end token, or with start and end."""
    weigh_by_size: bool = True
    """A merged token counts as many times as patches it stands for."""
    temperature: float = 0.07
    """Initial temperature of every term; each learns its own."""

    def __post_init__(self) -> None:
        _check_literals(self)
        for name in ("frequency_weight", "token_weight", "consistency_weight"):
            _check_number(self, name, minimum=0.0)
        _check_counts(self, "token_dim")
        _check_flags(self, "weigh_by_size")
        _check_number(self, "temperature", minimum=0.01)

    @property
    def spatial_tokens(self) -> bool:
        """Whether spatial tokens are aligned with text tokens."""
        return self.token_weight > 0 and self.token_domains != "frequency"

    @property
    def frequency_tokens(self) -> bool:
        """Whether frequency tokens are aligned with text tokens."""
        return self.token_weight > 0 and self.token_domains != "spatial"

    @property
    def frequency_feature(self) -> bool:
        """Whether a global frequency feature is trained."""
        return self.frequency_weight > 0 or self.consistency_weight > 0


@dataclass(frozen=True)
class MLIPConfig:
    """Configuration of `MLIP`; ``MLIPConfig.clip(...)`` is the same model as plain CLIP."""

    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    frequency: FrequencyConfig = field(default_factory=FrequencyConfig)
    merging: MergingConfig = field(default_factory=MergingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    embed_dim: int = 512
    """Channels of the global image and text features."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            part = getattr(self, name)
            if name != "embed_dim" and not isinstance(part, kind):
                raise TypeError(f"MLIPConfig.{name}: expected {kind.__name__}, got {type(part).__name__}")
        _check_counts(self, "embed_dim")
        layers = self.merging.layers
        if layers is not None and layers[-1] >= self.image.depth:
            raise ValueError(
                f"MergingConfig.layers: expected blocks in [0, {self.image.depth - 1}] of the image tower, got {layers}"
            )
        if self.merging.needs_frequency_tokens and not self.has_frequency_stage:
            raise ValueError(
                "MergingConfig.frequency_guide: 'similarity' needs a trained Frequency Stage, but every frequency term "
                "of LossConfig has weight 0; use frequency_guide='energy', guide='spatial' or a frequency term"
            )
        if self.merging.granularity == "three_way" and self.merging.guide == "none":
            raise ValueError("MergingConfig.guide: expected a guide for granularity='three_way', got 'none'")
        if self.loss.token_domains == "union" and self.transforms_text:
            raise ValueError(
                "LossConfig.token_domains: 'union' compares both domains with the same text tokens; expected "
                "FrequencyConfig.text_transform='none', got 'rfft'"
            )

    @property
    def has_frequency_stage(self) -> bool:
        """Whether the model holds a Frequency Stage: where a loss term or the image transformer reads it."""
        loss, frequency = self.loss, self.frequency
        compared = loss.frequency_feature or loss.frequency_tokens
        return compared or frequency.order == "sequential" or frequency.fusion == "residual"

    @property
    def transforms_text(self) -> bool:
        """Whether text passes a frequency block for the terms in the frequency domain."""
        compared = self.loss.frequency_weight > 0 or self.loss.frequency_tokens
        return self.frequency.text_transform == "rfft" and compared

    def check_plain_tower(self) -> None:
        """Raise unless the image feature is that of the image transformer alone, apart from which tokens merge.

        Raises:
            ValueError: naming the field by which the transformer reads the Frequency Stage.
        """
        frequency = self.frequency
        for name, value, plain in (("order", frequency.order, "parallel"), ("fusion", frequency.fusion, "none")):
            if value != plain:
                raise ValueError(
                    f"FrequencyConfig.{name}: expected {plain!r}, got {value!r}: the image transformer reads the "
                    "tokens of the Frequency Stage, which only an MLIP has; MLIP.save_pretrained keeps them"
                )

    def clip(self) -> MLIPConfig:
        """The same towers trained as plain CLIP: no frequency term, no token term, no merging."""
        return dataclasses.replace(
            self,
            frequency=dataclasses.replace(self.frequency, order="parallel", fusion="none"),
            merging=dataclasses.replace(self.merging, keep_rate=1.0, granularity="sizes", test_keep_rate=None),
            loss=dataclasses.replace(self.loss, frequency_weight=0.0, token_weight=0.0, consistency_weight=0.0),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, for a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MLIPConfig:
        """The inverse of `to_dict`; an unknown key is an error that names it."""
        return _from_dict(cls, values, cls.__name__)


def _from_dict(kind: type, values: dict[str, Any], path: str) -> Any:
    if not isinstance(values, dict):
        raise TypeError(f"{path}: expected a dictionary of its fields, got {type(values).__name__}")
    hints = get_type_hints(kind)
    unknown = set(values) - set(hints)
    if unknown:
        named, known = (", ".join(sorted(map(str, names))) for names in (unknown, hints))
        raise ValueError(f"{path}: unknown field {named}; known are {known}")
    converted = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = _from_dict(hints[name], value, f"{path}.{name}")
        elif isinstance(value, list):
            value = tuple(value)
        converted[name] = value
    return kind(**converted)
