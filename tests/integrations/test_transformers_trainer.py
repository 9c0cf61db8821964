"""Fine-tuning by Hugging Face's trainer, with merging and losses of this package."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
pytest.importorskip("accelerate", reason="needs accelerate, for the trainer: pip install accelerate")

from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mlip_kernels.integrations.transformers import contrastive_loss
from mlip_kernels.nn import ClipLoss
from mlip_kernels.patch import transformers as patch
from mlip_kernels.testing import assert_close

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SIZES | {"image_size": 32, "patch_size": 8}
TEXT = SIZES | {"vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 63, "pad_token_id": 0}


def tiny(kind: type[PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind is SiglipModel:
        return SiglipModel(SiglipConfig(text_config=TEXT | {"projection_size": 32}, vision_config=VISION))
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))


def pairs(count: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    texts = torch.randint(1, 63, (count, 8), generator=generator)
    return [{"pixel_values": image, "input_ids": text} for image, text in zip(images, texts, strict=True)]


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.seen.append(logs["loss"])


@pytest.mark.parametrize("kind", [CLIPModel, SiglipModel])
@pytest.mark.parametrize("checkpointing", [{}, {"gradient_checkpointing": True}], ids=["kept", "checkpointed"])
def test_losses_fall(kind: type[PreTrainedModel], checkpointing: dict[str, bool], tmp_path: Path):
    model, losses = patch.apply(tiny(kind), r=3), Losses()
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=16,
        max_steps=8,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=True,
        **checkpointing,
    )
    loss = contrastive_loss(model)
    Trainer(model, arguments, train_dataset=pairs(), compute_loss_func=loss, callbacks=[losses]).train()
    assert len(losses.seen) == 8
    assert losses.seen[-1] < losses.seen[0]


@pytest.mark.parametrize("kind", [CLIPModel, SiglipModel])
def test_the_loss_is_that_of_the_model(kind: type[PreTrainedModel]):
    model = tiny(kind).eval()
    batch = {name: torch.stack([pair[name] for pair in pairs()]) for name in ("pixel_values", "input_ids")}
    outputs = model(**batch, return_loss=True)
    assert_close(contrastive_loss(model)(outputs), outputs.loss, roundings=64)


def test_another_loss_and_what_is_refused():
    model = tiny(CLIPModel)
    outputs = model(**{name: torch.stack([p[name] for p in pairs(4)]) for name in ("pixel_values", "input_ids")})
    smoothed = contrastive_loss(model, ClipLoss(label_smoothing=0.5))(outputs)
    assert not torch.equal(smoothed, contrastive_loss(model)(outputs))
    with pytest.raises(TypeError, match=r"model: expected one with a logit_scale, .*, got Linear"):
        contrastive_loss(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="outputs: expected image_embeds and text_embeds"):
        contrastive_loss(model)(outputs.vision_model_output)
