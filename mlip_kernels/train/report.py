"""The picture that a run ends with: loss curve, retrieved pairs, and which patches were merged."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from mlip_kernels.data import Batch
from mlip_kernels.data.batch import CLIP_MEAN, CLIP_STD
from mlip_kernels.models import MLIP
from mlip_kernels.train import logs
from mlip_kernels.train.config import TrainConfig
from mlip_kernels.train.files import replacing
from mlip_kernels.train.loop import Outcome
from mlip_kernels.visualization import painted

EXAMPLES = 6


def write_report(outcome: Outcome, config: TrainConfig) -> Path:
    """Draw ``report.png`` in the output folder and return its path."""
    # A caption may hold two dollar signs, and a matplotlibrc ask for LaTeX: captions are text, never mathematics.
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
        return _write_report(outcome, config)


def _write_report(outcome: Outcome, config: TrainConfig) -> Path:
    folder = Path(config.output)
    batches = list(outcome.data.held_out(config.batch_size))
    held_out = Batch(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.text for batch in batches]),
        [caption for batch in batches for caption in batch.captions],
    )
    examples = min(EXAMPLES, len(held_out.captions))
    figure = plt.figure(figsize=(2.3 * EXAMPLES, 11), layout="constrained")
    grid = figure.add_gridspec(4, EXAMPLES, height_ratios=(1.5, 1, 1, 1))
    _draw_losses(figure.add_subplot(grid[0, :]), logs.read(folder / "metrics.csv"))
    chosen = torch.linspace(0, len(held_out.captions) - 1, examples).long().tolist()
    pictures = denormalize(held_out.images[chosen])
    merged = merged_pictures(outcome.model, held_out.images[chosen])
    for column, place in enumerate(chosen):
        _draw_retrieved(figure.add_subplot(grid[1, column]), pictures[column], place, outcome, held_out.captions)
        _draw_found(figure.add_subplot(grid[2, column]), place, outcome, held_out)
        axes = figure.add_subplot(grid[3, column])
        axes.imshow(merged[column].permute(1, 2, 0).numpy())
        axes.axis("off")
    for row, label in enumerate(("image → captions", "caption → image", "merged tokens"), start=1):
        figure.add_subplot(grid[row, :], frameon=False, xticks=[], yticks=[], ylabel=label)
    if outcome.data.attribution:
        figure.text(0.5, -0.01, outcome.data.attribution, ha="center", va="top", fontsize=7)
    path = folder / "report.png"
    try:
        with replacing(path) as file:
            figure.savefig(file, dpi=110, bbox_inches="tight", format="png")
    finally:
        plt.close(figure)
    return path


def _draw_losses(axes: Axes, rows: list[tuple[int, str, float]]) -> None:
    terms = ("loss", "global_spatial", "global_frequency", "token_spatial", "token_frequency", "token_union")
    for term in terms:
        points = [(step, value) for step, name, value in rows if name == term]
        if points:
            axes.plot(*zip(*points, strict=True), label=term.replace("_", " "), linewidth=2 if term == "loss" else 1)
    axes.set_xlabel("step")
    axes.set_ylabel("contrastive loss")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_retrieved(axes: Axes, picture: Tensor, place: int, outcome: Outcome, captions: list[str]) -> None:
    """An image with the three captions nearest to it; its own one is marked."""
    axes.imshow(picture.permute(1, 2, 0).numpy())
    nearest = outcome.retrieval.similarity[place].topk(min(3, len(captions))).indices.tolist()
    lines = [textwrap.shorten(("✓ " if i == place else "   ") + captions[i], 34, placeholder="…") for i in nearest]
    axes.set_title("\n".join(lines), fontsize=7, loc="left")
    axes.axis("off")


def _draw_found(axes: Axes, place: int, outcome: Outcome, held_out: Batch) -> None:
    """The image nearest to a caption."""
    nearest = int(outcome.retrieval.similarity[:, place].argmax())
    axes.imshow(denormalize(held_out.images[nearest : nearest + 1])[0].permute(1, 2, 0).numpy())
    title = ("✓ " if nearest == place else "✗ ") + held_out.captions[place]
    axes.set_title(textwrap.shorten(title, 34, placeholder="…"), fontsize=7, loc="left")
    axes.axis("off")


def denormalize(images: Tensor) -> Tensor:
    """Undo CLIP's normalisation of ``images [B, 3, S, S]``, to colours in [0, 1]."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (images * std + mean).clamp(0, 1)


@torch.no_grad()
def merged_pictures(model: MLIP, images: Tensor) -> Tensor:
    """Images whose patches show the mean colour of the token they went into, with lines between tokens.

    Args:
        images: ``[B, 3, S, S]`` normalised.

    Returns:
        ``[B, 3, S, S]`` in [0, 1] on the CPU.
    """
    model.eval()
    device = next(model.parameters()).device
    origin = model.encode_image_tokens(images.to(device))[0].origin.cpu()
    return painted(denormalize(images), origin, model.visual.grid)
