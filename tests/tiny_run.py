"""A tiny run: pictures of flat colours with captions that name them, and a model that sees them in milliseconds."""

import csv
import itertools
from pathlib import Path

import numpy as np
from PIL import Image

from mlip_kernels.models import FrequencyConfig, ImageConfig, LossConfig, MergingConfig, MLIPConfig, TextConfig
from mlip_kernels.train import TrainConfig

MODEL = MLIPConfig(
    image=ImageConfig(image_size=32, patch_size=8, width=32, depth=4, heads=2, drop_path=0.1),
    text=TextConfig(context_length=10, width=32, depth=1, heads=2),
    frequency=FrequencyConfig(depth=1, mlp_ratio=1.0),
    merging=MergingConfig(keep_rate=0.7, warmup_steps=4),
    loss=LossConfig(token_dim=16),
    embed_dim=16,
)


def write_pairs(folder: Path) -> Path:
    """Write a CSV of 48 pictures; its path."""
    levels = {"no": 0, "little": 85, "some": 170, "much": 255}
    shades = itertools.islice(itertools.product(levels, repeat=3), 48)
    generator = np.random.default_rng(0)
    with (folder / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(("filepath", "title"))
        for number, shade in enumerate(shades):
            colour = np.array([levels[level] for level in shade])
            pixels = np.clip(colour + generator.normal(0, 12, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            rows.writerow((f"{number}.png", f"{shade[0]} red, {shade[1]} green, {shade[2]} blue"))
    return folder / "pairs.csv"


def configuration(pairs: Path, output: Path) -> TrainConfig:
    """Eight steps on ``pairs`` with a checkpoint every three."""
    return TrainConfig(
        model=MODEL,
        data=str(pairs),
        held_out_pairs=12,
        batch_size=6,
        output=str(output),
        steps=8,
        warmup_steps=2,
        learning_rate=3e-3,
        log_every=2,
        checkpoint_every=3,
    )
