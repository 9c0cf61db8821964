"""A contrastive batch in parts: gradients of the whole, memory of one part."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlip_kernels import merge_tokens
from mlip_kernels.nn import CachedContrastive, ClipLoss, SigLipLoss, TokenContrastiveLoss
from mlip_kernels.testing import assert_close, assert_identical


class Towers(nn.Module):
    """Two towers; returns what a loss takes, as a tuple or a dict."""

    def __init__(self, form: str = "tuple", dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(12, 8), nn.Linear(6, 8)
        self.dropout = nn.Dropout(dropout)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-1.0))
        self.form = form
        self.seen: list[int] = []

    def forward(self, images: Tensor, texts: Tensor) -> Any:
        self.seen.append(len(images))
        features = [F.normalize(one, dim=-1) for one in (self.dropout(self.image(images)), self.text(texts))]
        if self.form == "tuple":
            return *features, self.logit_scale.exp(), self.logit_bias
        names = ("image_features", "text_features", "logit_scale", "logit_bias")
        return dict(zip(names, (*features, self.logit_scale.exp(), self.logit_bias), strict=True))


def data(parts: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [
        (torch.randn(size, 12, generator=generator), torch.randn(size, 6, generator=generator)) for _ in range(parts)
    ]
    return [(images.double(), texts.double()) for images, texts in made]


def gradients(model: nn.Module) -> list[Tensor]:
    """The bias last, with the scale: a loss that does not change with it has nothing but rounding there."""
    ordered = dict(model.named_parameters())
    both = torch.stack([ordered.pop("logit_scale").grad, ordered.pop("logit_bias").grad])
    return [*(parameter.grad for parameter in ordered.values()), both]


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("form", ["tuple", "dict"])
@pytest.mark.parametrize("loss", [ClipLoss(), SigLipLoss()], ids=["CLIP", "SigLIP"])
def test_gradients_are_those_of_the_whole_batch(parts: int, form: str, loss: nn.Module):
    model, batches = Towers(form).double(), data(parts)
    outputs = model(*(torch.cat(side) for side in zip(*batches, strict=True)))
    wanted = loss(*outputs) if form == "tuple" else loss(**outputs)
    wanted.backward()
    whole = copy.deepcopy(gradients(model))
    model.zero_grad()
    found = CachedContrastive(model, loss).backward(batches)
    assert_close(found, wanted.detach(), roundings=16)
    assert not found.requires_grad
    for now, then in zip(gradients(model), whole, strict=True):
        assert_close(now, then, roundings=64)
    assert model.seen[1:] == [4] * (2 * parts - 1)


class Tokens(Towers):
    """Towers that return merged tokens, with masks and sizes, and a term that is a dict in a dict."""

    def forward(self, images: Tensor, texts: Tensor) -> Any:
        tokens = self.image(images[:, None] * torch.linspace(0.5, 1.5, 9, dtype=images.dtype)[:, None])
        merged, size, _ = merge_tokens(tokens, tokens.detach(), 3, prefix_tokens=1)
        return {
            "image_tokens": F.normalize(self.dropout(merged), dim=-1),
            "text_tokens": F.normalize(self.text(texts), dim=-1)[:, None].expand(-1, 2, -1),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
            "image_weight": size,
            "text_mask": torch.ones(len(texts), 2, dtype=torch.bool),
        }


def test_tokens_masks_and_sizes_travel():
    model, batches = Tokens().double(), data(3)
    loss = TokenContrastiveLoss()
    loss(**model(*(torch.cat(side) for side in zip(*batches, strict=True)))).backward()
    whole = copy.deepcopy(gradients(model))
    model.zero_grad()
    CachedContrastive(model, lambda **outputs: loss(**outputs, output_dict=True)).backward(batches)
    for now, then in zip(gradients(model), whole, strict=True):
        assert_close(now, then, roundings=256)


@pytest.mark.parametrize("kind", [Towers, Tokens])
def test_dropout_and_merging_are_repeated(kind: type[Towers]):
    """Gradients are those of one graph over all parts, each encoded with the random numbers that it had."""
    model, batches = kind("dict", dropout=0.5).double(), data(3)
    loss = ClipLoss() if kind is Towers else TokenContrastiveLoss()
    torch.manual_seed(3)
    outputs = [model(*part) for part in batches]
    after = torch.get_rng_state()
    whole = {
        name: torch.cat([o[name] for o in outputs]) if outputs[0][name].dim() else outputs[0][name]
        for name in outputs[0]
    }
    wanted = loss(**whole)
    wanted.backward()
    expected = copy.deepcopy(gradients(model))
    model.zero_grad()
    torch.manual_seed(3)
    assert_close(CachedContrastive(model, loss).backward(batches), wanted.detach(), roundings=16)
    for now, then in zip(gradients(model), expected, strict=True):
        assert_close(now, then, roundings=64)
    assert_identical(torch.get_rng_state(), after)


def test_terms_come_back_by_name_and_gradients_add_up():
    model, batches = Towers().double(), data(2)
    terms = {"once": 1.0, "twice": 2.0}
    step = CachedContrastive(model, lambda *outputs: {name: w * ClipLoss()(*outputs) for name, w in terms.items()})
    found = step.backward(batches)
    assert_identical(found["twice"], 2 * found["once"])
    first = copy.deepcopy(gradients(model))
    step.backward(batches)
    for now, then in zip(gradients(model), first, strict=True):
        assert_close(now, 2 * then, roundings=16)


def test_autocast_reaches_model_and_loss():
    model, batches = Towers("dict"), [(images.float(), texts.float()) for images, texts in data(2)]
    kinds = []

    def loss(**outputs: Tensor) -> Tensor:
        kinds.append(outputs["image_features"].dtype)
        return ClipLoss()(**outputs)

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    CachedContrastive(model, loss, autocast=autocast).backward(batches)
    assert kinds == [torch.bfloat16]
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model))


def test_no_part_is_refused():
    with pytest.raises(ValueError, match="micro_batches: expected at least one, got none"):
        CachedContrastive(Towers(), ClipLoss()).backward([])


def test_memory_is_flat_in_the_number_of_parts():
    """What autograd keeps of the towers is that of one part, however many there are."""
    peaks = []
    for parts in (2, 8):
        model, kept, peak = Towers().double(), [0], [0]

        def pack(tensor: Tensor, kept: list[int] = kept, peak: list[int] = peak) -> Any:
            kept[0] += tensor.nbytes
            peak[0] = max(peak[0], kept[0])
            return Held(tensor, kept)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            CachedContrastive(model, lambda *outputs: outputs[0].sum() * 0 + ClipLoss()(*outputs)).backward(
                data(parts, size=8)
            )
        peaks.append(peak[0] - 8 * 3 * (8 * parts) * (8 + 8 * parts))  # less the loss of the whole batch
    assert peaks[1] <= peaks[0]


class Held:
    """A saved tensor that says when it is let go."""

    def __init__(self, tensor: Tensor, kept: list[int]) -> None:
        self.tensor, self.kept = tensor, kept

    def __del__(self) -> None:
        self.kept[0] -= self.tensor.nbytes
