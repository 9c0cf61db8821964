"""A model as a folder: save it, load it, compare a picture with captions, and hand it to open_clip.

    python examples/save_and_load.py

`mlip-train` writes such a folder at the end of a run, `model/` in its output. Weights are random here, so the
similarities mean nothing; that they are the same everywhere does.
"""

import tempfile
import time
from pathlib import Path

import open_clip
import torch
from PIL import Image

import mlip_kernels.patch.open_clip
from mlip_kernels.models import MLIP, ImageConfig, MergingConfig, MLIPConfig, TextConfig
from mlip_kernels.models.export import export

PICTURE = Image.linear_gradient("L").resize((120, 90)).convert("RGB")
CAPTIONS = ["a gradient from black to white", "a photo of a cat"]


def trained() -> MLIP:
    """What a run of `mlip-train` would give, but for the weights."""
    torch.manual_seed(0)
    config = MLIPConfig(
        image=ImageConfig(image_size=64, patch_size=8, width=64, depth=4, heads=2),
        text=TextConfig(context_length=16, width=64, depth=2, heads=2),
        merging=MergingConfig(keep_rate=0.7, guide="spatial"),
        embed_dim=32,
    )
    return MLIP(config)


@torch.inference_mode()
def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = trained().save_pretrained(Path(name) / "model")
        print(f"saved:      {', '.join(sorted(path.name for path in folder.iterdir()))}")

        start = time.perf_counter()
        model = MLIP.from_pretrained(folder)
        image, text = model.preprocess(PICTURE)[None], model.tokenize(CAPTIONS)
        similarity = model.encode_image(image, normalize=True) @ model.encode_text(text, normalize=True).T
        print(f"loaded:     similarity {similarity[0].tolist()} after {time.perf_counter() - start:.2f} s")

        done = export(model, "open_clip", Path(name) / "open_clip")  # `mlip-export --to open_clip` from a shell
        theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{done.folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{done.folder}")
        mlip_kernels.patch.open_clip.apply(theirs.eval(), keep_rate=0.7, guide="spatial")  # as `done.merge` says
        image, text = preprocess(PICTURE)[None], tokenizer(CAPTIONS)
        similarity = theirs.encode_image(image, normalize=True) @ theirs.encode_text(text, normalize=True).T
        print(f"open_clip:  similarity {similarity[0].tolist()}")
        print(f"            where merging is {done.merge}")
        print(f"            {len(done.left)} parts stayed behind, as they serve training alone")


if __name__ == "__main__":
    main()
