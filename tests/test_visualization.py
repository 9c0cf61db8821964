"""Pictures of what merged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn

import mlip_kernels as mk
from mlip_kernels.models import MLIP, ImageConfig, MergingConfig, MLIPConfig, TextConfig
from mlip_kernels.patch import open_clip
from mlip_kernels.patch import timm as patch
from mlip_kernels.visualization import painted, visualize


def of_timm(r: int = 4) -> nn.Module:
    model = timm.create_model("vit_small_patch16_224", embed_dim=48, depth=2, num_heads=3, img_size=64)
    return patch.apply(model, r=r)


def of_open_clip(r: int = 4) -> nn.Module:
    model = nn.Module()
    model.visual = VisionTransformer((64, 96), 16, 48, 2, 3, 2.0)
    open_clip.apply(model, r=r)
    return model


def of_transformers(r: int = 4, kind: str = "Siglip") -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    from mlip_kernels.patch import transformers as of_hugging_face

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    images = {} if kind == "Siglip2" else {"image_size": 64}
    config = getattr(transformers, f"{kind}VisionConfig")(patch_size=16, **images, **sizes)
    return of_hugging_face.apply(getattr(transformers, f"{kind}VisionModel")(config), r=r)


def halves(height: int = 64, width: int = 64) -> Tensor:
    """White on the left, black on the right, as a model with timm's normalisation of 0.5 takes it."""
    image = torch.full((3, height, width), -1.0)
    image[:, :, : width // 2] = 1
    return image


@pytest.mark.parametrize(("made", "size"), [(of_timm, (64, 64)), (of_open_clip, (64, 96)), (of_transformers, (64, 64))])
def test_the_image_stands_beside_its_tokens(made: Any, size: tuple[int, int]):
    model = made().train()
    pixels = np.asarray(mk.visualize(model, halves(*size)))
    assert model.training
    height, width = size
    assert pixels.shape == (height, 2 * width, 3)
    assert (pixels[:, : width // 2] == 255).all()
    assert (pixels[:, width // 2 : width] == 0).all()
    assert not (pixels[:, width : width + width // 2] == 255).all()  # lines between tokens


@pytest.mark.parametrize("made", [of_timm, of_transformers])
def test_without_merging_every_patch_is_a_token(made: Any):
    pixels = np.asarray(visualize(made(r=0), halves()))[:, 64:]
    assert (pixels[::16, 1:16][1:] < 255).all()  # a line above each row of patches
    assert (pixels[1:16, 1:16] == 255).all()


def test_a_model_of_ours_and_several_images(tmp_path: Path):
    config = MLIPConfig(
        image=ImageConfig(image_size=32, patch_size=8, width=48, depth=2, heads=3),
        text=TextConfig(width=32, depth=1, heads=2),
        merging=MergingConfig(layers=(0,), keep_rate=0.5),
    )
    model = MLIP(config)
    assert visualize(model, torch.randn(3, 3, 32, 32)).size == (64, 96)
    path = tmp_path / "picture.png"
    Image.new("RGB", (50, 40), (255, 0, 0)).save(path)

    def preprocess(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1) / 255

    with Image.open(path) as opened:
        assert visualize(model, [path, opened], preprocess).size == (64, 64)


def test_tokens_have_the_mean_colour_of_their_patches():
    image = torch.zeros(1, 3, 4, 6)
    image[..., :2] = 1.0
    picture = painted(image, torch.tensor([[0, 0, 1, 2, 2, 1]]), (2, 3))
    assert picture[0, 0, 1].tolist() == [0.5, 0.5, 0.5, 0.5, 0.0, 0.0]
    assert picture[0, 0, 0, :3].tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("model", "image", "error", "message"),
    [
        (lambda: nn.Linear(1, 1), halves(), TypeError, "model: expected an MLIP, or a model patched by .*, got Linear"),
        (lambda: of_transformers(kind="Siglip2"), halves(), TypeError, "got Siglip2VisionModel, which takes patches"),
        (of_timm, 3, TypeError, "image: expected a PIL image, a path or a tensor, got int"),
        (of_timm, torch.zeros(4), ValueError, r"image: expected \[3, H, W\]"),
        (of_timm, Image.new("RGB", (4, 4)), ValueError, "preprocess: expected what VisionTransformer"),
    ],
)
def test_what_cannot_be_drawn(model: Any, image: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message.replace("VisionTransformer", ".*VisionTransformer")):
        visualize(model(), image)
