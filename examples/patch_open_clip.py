"""Patch an open_clip model so that its image tower merges tokens: what stays, and what the merged tokens are.

    python examples/patch_open_clip.py

`apply` changes a model in place and `remove` gives it back. Weights are random here; give `open_clip.create_model` a
`pretrained` tag to see features that matter.
"""

import open_clip
import torch
import torch.nn.functional as F

from mlip_kernels.patch import open_clip as patch

VISION = {"image_size": 64, "patch_size": 8, "width": 96, "layers": 6, "head_width": 32}
TEXT = {"context_length": 16, "width": 64, "heads": 2, "layers": 2}


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(64, VISION, TEXT).eval()  # open_clip.create_model("ViT-B-16", pretrained="…")
    images, texts = torch.rand(4, 3, 64, 64), open_clip.tokenize(["a photo of a cat"] * 4, context_length=16)
    before = model.encode_image(images)
    text_features = model.encode_text(texts)

    for settings in ({"r": 4}, {"keep_rate": 0.7, "layers": (1, 3), "guide": "spatial"}):
        patch.apply(model, **settings)
        cosine = F.cosine_similarity(model.encode_image(images), before).mean()
        tokens, size, _ = model.visual.forward_merged(images)
        print(
            f"{settings}: {tokens.shape[1] - 1} of 64 patch tokens left, cosine with the features before {cosine:.3f}"
        )
        print(f"    the largest token stands for {int(size[:, 1:].max())} patches")
        intermediates = model.visual.forward_intermediates(images)["image_intermediates"]
        print(f"    forward_intermediates still returns {tuple(intermediates[-1].shape)}")

    torch.testing.assert_close(model.encode_text(texts), text_features)
    print("texts: the features of before")
    patch.remove(model)
    torch.testing.assert_close(model.encode_image(images), before)
    print("remove(model): the features of before")


if __name__ == "__main__":
    main()
