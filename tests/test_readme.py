"""What the README shows works, and its table says what is there."""

import re

import page_snippets
import pytest
import torch
from page_snippets import ROOT

import mlip_kernels

PAGE = ROOT / "README.md"
README = PAGE.read_text(encoding="utf-8")
NOT_OPERATORS = {"MergePlan", "use_reference", "keep_rate_schedule", "merge_layers", "merge_schedule", "token_counts"}
PRIMITIVES = {  # functions and the operator that does their work
    "dct": "separable",
    "idct": "separable",
    "spectral_resize": "separable",
    "rfft": "analysis",
    "irfft": "synthesis",
    "amplitude_phase": "analysis",
    "spectral_filter": "filtered",
    "token_logits": "token_maxima",
    "merge_plan": "match",
    "merge_tokens": "merge",
}
KERNELS = {
    "CPU C++": "csrc/bindings/cpu/*.cpp",
    "CUDA C++": "csrc/bindings/cuda/*.cpp",
    "Triton": "mlip_kernels/triton/*/*.py",
}


def table() -> dict[str, dict[str, str]]:
    """Operator -> column -> cell."""
    section = README.partition("## What is there\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header, rows = cells[0], cells[2:]
    return {name: dict(zip(header, row, strict=True)) for row in rows for name in re.findall(r"`(\w+)`", row[0])}


def has_kernel(column: str, primitive: str) -> bool:
    """C++ kernels are registered by bindings; Triton's are functions of their name."""
    pattern = rf"def \w*{primitive}\w*_kernel\(" if column == "Triton" else rf'm\.impl\("[a-z]+_{primitive}"'
    return any(re.search(pattern, file.read_text(encoding="utf-8")) for file in ROOT.glob(KERNELS[column]))


def test_the_table_lists_every_operator():
    assert set(table()) == set(mlip_kernels.__all__) - NOT_OPERATORS


@pytest.mark.parametrize("column", KERNELS)
def test_the_table_claims_the_kernels_that_exist(column):
    for operator, row in table().items():
        exists = has_kernel(column, PRIMITIVES.get(operator, operator))
        assert (row[column] == "yes") == exists, f"{operator}: {column}"


def test_the_examples_run(monkeypatch, tmp_path):
    timm = pytest.importorskip("timm", reason="the model that an example patches")
    pytest.importorskip("open_clip", reason="needs the [train] extra")
    from PIL import Image

    from mlip_kernels.models import MLIP
    from mlip_kernels.train.config import SMALL

    monkeypatch.chdir(tmp_path)
    MLIP(SMALL).save_pretrained("runs/openmoji/model")
    Image.new("RGB", (50, 40), "red").save("picture.png")
    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: original(name, embed_dim=48, num_heads=3))
    names = page_snippets.run(PAGE)
    assert names["merged"].shape == (8, 133, 768)
    assert names["image"].shape == (8, 768)
    assert names["per_image"].shape == names["per_text"].shape == (8, 8)
    assert torch.equal(names["size"].sum(1), torch.full((8,), 197.0))
    assert names["loss"].shape == ()
    assert type(names["model"]) is timm.models.VisionTransformer
    assert names["similarity"].shape == (1, 2)
