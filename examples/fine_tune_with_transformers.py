"""Fine-tune Hugging Face's CLIP with token merging and the loss of this package, by ``Trainer``.

    python examples/fine_tune_with_transformers.py

The pairs are squares of one colour and the name of it as two numbers; weights are random. For a real model, load it by
`CLIPModel.from_pretrained` and give the trainer the output of its processor.
"""

import tempfile

import torch
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments

from mlip_kernels.integrations.transformers import contrastive_loss
from mlip_kernels.patch import transformers as patch

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION = SIZES | {"image_size": 32, "patch_size": 4}
TEXT = SIZES | {"vocab_size": 40, "max_position_embeddings": 3, "eos_token_id": 39}
PAIRS, STEPS = 64, 40


def pairs() -> list[dict[str, torch.Tensor]]:
    colours = [(red, blue) for red in range(8) for blue in range(8)]
    images = [torch.tensor([red / 8, 0.5, blue / 8])[:, None, None].expand(3, 32, 32) for red, blue in colours]
    texts = [torch.tensor([red, 8 + blue, 39]) for red, blue in colours]
    return [{"pixel_values": image, "input_ids": text} for image, text in zip(images, texts, strict=True)]


@torch.inference_mode()
def recall(model: CLIPModel, data: list[dict[str, torch.Tensor]]) -> float:
    batch = {name: torch.stack([pair[name] for pair in data]) for name in data[0]}
    found = model.eval()(**batch).logits_per_image.argmax(1)
    return (found == torch.arange(PAIRS)).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    model, data = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=32)), pairs()
    patch.apply(model, r=12)  # 64 patches become 28 over three layers
    print(f"recall@1 before: {recall(model, data):.0%}")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=PAIRS,
            max_steps=STEPS,
            learning_rate=3e-3,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data, compute_loss_func=contrastive_loss(model))
        print(f"loss, average:   {trainer.train().training_loss:.2f}")
    print(f"recall@1 after:  {recall(model.cpu(), data):.0%}")


if __name__ == "__main__":
    main()
