"""Zero-shot classification of a folder of class folders, as open_clip's ``--imagenet-val`` does it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, build_zero_shot_classifier
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from mlip_kernels.models import MLIP

RANKS = (1, 5)
NAMES = tuple(f"zeroshot_top{k}" for k in RANKS)
"""Of the figures of a classification."""
CLASSNAMES = "classnames.json"
"""File in the folder that maps its folders to the names of the classes."""
SYNSET = re.compile(r"n\d{8}")


class ClassFolders:
    """Pictures in a folder for each class, and the names of the classes.

    Args:
        folder: that holds the folders.

    Raises:
        OSError: if there is no such folder; names it.
        ValueError: if it has no class folders with pictures, or their names are not known.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(2, "expected a folder of class folders, found none", str(folder))
        try:
            self.pictures = ImageFolder(str(folder))
        except FileNotFoundError as failure:  # of torchvision: a folder is empty
            raise ValueError(f"zeroshot: {failure}") from failure
        self.names = _names(folder, self.pictures.classes)


def _names(folder: Path, classes: list[str]) -> list[str]:
    """What the classes in these folders are called."""
    file = folder / CLASSNAMES
    if file.is_file():
        try:
            names = json.loads(file.read_text(encoding="utf-8"))
            return [str(names[name]) for name in classes]
        except (ValueError, TypeError, KeyError) as failure:
            raise ValueError(f"{file}: expected an object with a name for each folder, got {failure!r}") from failure
    synsets = [name for name in classes if SYNSET.fullmatch(name)]
    if not synsets:
        return [name.replace("_", " ") for name in classes]
    if len(synsets) == len(classes) == len(IMAGENET_CLASSNAMES):
        return list(IMAGENET_CLASSNAMES)  # in the order of the synsets
    raise ValueError(
        f"zeroshot: expected the {len(IMAGENET_CLASSNAMES):,} synsets of ImageNet, got {len(synsets)} among "
        f"{len(classes)} folders; name them in {file}"
    )


@torch.no_grad()
def classify(
    model: MLIP, folders: ClassFolders, device: torch.device, autocast: torch.autocast, batch_size: int, workers: int
) -> dict[str, float]:
    """Share of pictures whose class is the most similar one, and among the five most similar ones.

    The feature of a class is the mean of those of its name in the 80 templates of Radford et al., "Learning
    Transferable Visual Models From Natural Language Supervision", ICML 2021. A tie with a wrong class counts against
    the right one. Evaluation mode, whatever the mode of ``model``, which comes back.
    """
    training = model.training
    model.eval()
    folders.pictures.transform = model.preprocess
    loader = DataLoader(folders.pictures, batch_size=batch_size, num_workers=workers)
    right = dict.fromkeys(RANKS, 0)
    with autocast:
        classes = build_zero_shot_classifier(
            model, model.tokenize, folders.names, OPENAI_IMAGENET_TEMPLATES, device=device
        ).float()
    for images, labels in loader:
        with autocast:
            features = model.encode_image(images.to(device, non_blocking=True), normalize=True).float()
        similarity = features @ classes
        own = similarity.gather(1, labels.to(device)[:, None])
        better = (similarity >= own).sum(1) - 1
        for k in RANKS:
            right[k] += int((better < k).sum())
    model.train(training)
    return {name: right[k] / len(folders.pictures) for name, k in zip(NAMES, RANKS, strict=True)}
