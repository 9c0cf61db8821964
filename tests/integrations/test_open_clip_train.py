"""open_clip's own training script, with merging and losses of this package."""

import argparse
import csv
import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image

pytest.importorskip("pandas", reason="needs pandas, for open_clip's script: pip install pandas")

from open_clip_train import main as script

from mlip_kernels.integrations import open_clip as integration
from mlip_kernels.nn import ClipLoss
from mlip_kernels.patch import open_clip as patch
from mlip_kernels.testing import assert_close, assert_identical

NAME = "mlip-kernels-tiny"
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 48 pictures of one colour, and the configuration of a tiny model."""
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / f"{NAME}.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}))
    open_clip.add_model_config(folder / f"{NAME}.json")
    with (folder / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["filepath", "title"])
        for i in range(48):
            colour = (5 * i, 255 - 5 * i, 60 + 3 * i)
            Image.new("RGB", (32, 32), colour).save(folder / f"{i}.png")
            rows.writerow([folder / f"{i}.png", f"a square of colour {i}"])
    return folder


def train(data: Path, logs: Path, *options: str) -> list[dict[str, Any]]:
    """Train for an epoch; what evaluation found."""
    common = ["--model", NAME, "--train-data", data / "pairs.csv", "--val-data", data / "pairs.csv", "--logs", logs]
    common += ["--dataset-type", "csv", "--batch-size", 8, "--workers", 0, "--name", "run", "--device", "cpu"]
    rest = ["--epochs", 1, "--lr", 1e-3, "--warmup", 1, "--log-every-n-steps", 1, "--precision", "fp32"]
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        integration.main([*map(str, [*common, *rest]), *options])
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    with (logs / "run" / "checkpoints" / "results.jsonl").open() as file:
        return [json.loads(line) for line in file]


MERGE = ("--merge-r", "3")
TOKENS = ("--token-weight", "1.0")


@pytest.mark.parametrize(
    "options",
    [
        MERGE,
        (*MERGE, *TOKENS),
        (*MERGE, *TOKENS, "--accum-freq", "2"),
        (*MERGE, *TOKENS, "--grad-checkpointing"),
        (*MERGE, *TOKENS, "--siglip"),
        (*MERGE, *TOKENS, "--precision", "amp_bf16"),
        ("--merge-keep-rate", "0.5", "--merge-layers", "1", "--merge-guide", "both", *TOKENS),
        (*MERGE, *TOKENS, "--force-patch-dropout", "0.5"),
        (*MERGE, "--lock-image", "--lock-image-unlocked-groups", "1"),
    ],
    ids=" ".join,
)
def test_the_script_trains_and_evaluates(data: Path, tmp_path: Path, options: tuple[str, ...]):
    (found,) = train(data, tmp_path, *options)
    assert found["epoch"] == 1
    assert found["num_samples"] == 48
    assert 0 < found["clip_val_loss"] < 10
    saved = torch.load(tmp_path / "run" / "checkpoints" / "epoch_1.pt", map_location="cpu", weights_only=False)
    model = open_clip.create_model(NAME, init_logit_bias=-10.0 if "--siglip" in options else None)
    model.load_state_dict(saved["state_dict"])  # of plain open_clip


def test_a_run_is_resumed(data: Path, tmp_path: Path):
    train(data, tmp_path, *MERGE, *TOKENS)
    found = train(data, tmp_path, *MERGE, *TOKENS, "--resume", "latest", "--epochs", "2")
    assert [line["epoch"] for line in found] == [1, 2]


def test_compiled(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: real(model, backend="aot_eager"))
    (found,) = train(data, tmp_path, *MERGE, *TOKENS, "--torchcompile")
    assert 0 < found["clip_val_loss"] < 10


def test_the_script_is_left_as_it_was(data: Path, tmp_path: Path):
    before = script.create_model_and_transforms, script.create_loss
    with pytest.raises(SystemExit):
        integration.main(["--no-such-option"])
    assert (script.create_model_and_transforms, script.create_loss) == before


def test_what_a_model_with_tokens_returns(data: Path):
    torch.manual_seed(0)
    plain = open_clip.create_model(NAME, output_dict=True).eval()
    images, texts = torch.randn(3, 3, 32, 32), open_clip.get_tokenizer(NAME)(["a", "a longer text", "another"])
    wanted = plain(images, texts)
    keys = list(plain.state_dict())
    model = integration.with_tokens(patch.apply(plain, r=0))
    found = model(images, texts)
    for name, value in wanted.items():
        assert_close(found[name], value, roundings=16)
    assert found["image_tokens"].shape == (3, 16, 16)
    assert "image_weight" not in found
    assert found["text_mask"].sum(1).tolist() == [3, 5, 3]
    assert list(model.state_dict()) == keys
    patch.set_merging(model, r=3)
    merged = model(images, texts)
    assert merged["image_tokens"].shape == (3, 10, 16)
    assert_identical(merged["image_weight"].sum(1), torch.full((3,), 16.0))
    assert model(image=images)["text_features"] is None
    assert integration.with_tokens(model) is model


@pytest.mark.parametrize("pool_type", ["tok", "avg"])
def test_features_are_those_without_tokens(pool_type: str):
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(16, VISION | {"pool_type": pool_type}, TEXT, output_dict=True).eval()
    images, texts = torch.randn(3, 3, 32, 32), torch.randint(1, 90, (3, 16))
    wanted = patch.apply(model, r=3)(images, texts)
    found = integration.with_tokens(model)(images, texts)
    for name, value in wanted.items():
        assert_close(found[name], value, roundings=64)


def test_the_token_loss_is_added_by_its_weight():
    torch.manual_seed(0)
    model = integration.with_tokens(patch.apply(open_clip.CLIP(16, VISION, TEXT, output_dict=True), r=3))
    found = model(torch.randn(4, 3, 32, 32), torch.randint(1, 90, (4, 16)))
    once, twice = (integration.TokenLoss(ClipLoss(), weight)(**found, output_dict=True) for weight in (1.0, 2.0))
    assert_identical(twice["contrastive_loss"], once["contrastive_loss"])
    assert_identical(twice["token_loss"], 2 * once["token_loss"])
    assert_identical(integration.TokenLoss(ClipLoss())(**found), sum(once.values()))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: torch.nn.Linear(1, 1), TypeError, "model: expected open_clip's CLIP or CustomTextCLIP, got Linear"),
        (lambda: open_clip.CLIP(16, VISION, TEXT), TypeError, "model.visual: expected .* after .*apply"),
        (
            lambda: patch.apply(open_clip.CLIP(16, VISION | {"attentional_pool": True, "attn_pooler_heads": 2}, TEXT)),
            ValueError,
            "model.visual: expected one that normalises its tokens",
        ),
        (
            lambda: patch.apply(open_clip.CustomTextCLIP(16, VISION, TEXT | {"embed_cls": True})),
            TypeError,
            "model.text: expected open_clip's TextTransformer without a class token",
        ),
    ],
)
def test_models_without_tokens_are_refused(model: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        integration.with_tokens(model())


def test_losses_without_tokens_refuse_their_weight():
    arguments = argparse.Namespace(model="coca_ViT-B-32", distill=False)
    with pytest.raises(ValueError, match="token-weight: expected 0"):
        integration.create_loss(arguments, token_weight=1.0)
