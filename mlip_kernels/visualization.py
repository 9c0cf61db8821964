"""What merged in an image: each patch in the mean colour of its token, with lines between tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlip_kernels._extras import needing

with needing("train", "mlip_kernels.visualization"):
    from PIL import Image

    from mlip_kernels.data.batch import CLIP_MEAN, CLIP_STD
    from mlip_kernels.models import MLIP
    from mlip_kernels.patch import timm


OF_TRANSFORMERS: dict[str, dict[str, tuple[float, ...]]] = {
    "clip_vision_model": {"mean": CLIP_MEAN, "std": CLIP_STD},
    "siglip_vision_model": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
}
"""How the processors of Hugging Face's vision models normalise images."""


def visualize(model: nn.Module, image: Any, preprocess: Callable[[Image.Image], Tensor] | None = None) -> Image.Image:
    """A picture of an image as a model sees it (left), and of the tokens that are left of its patches (right).

    Args:
        model: an `MLIP`, or a model after ``apply`` of `mlip_kernels.patch.timm`, `.open_clip` or `.transformers`. It
            is run in evaluation mode, without gradients.
        image: a PIL image, the path of one, or ``[3, H, W]`` as the model takes it; a list of them, or
            ``[B, 3, H, W]``, gives a row for each.
        preprocess: makes ``[3, H, W]`` of a PIL image, such as open_clip's ``preprocess_val``. Default:
            ``model.preprocess``, where there is one.

    Returns:
        An RGB picture, ``2 · W`` pixels wide and ``B · H`` high.

    Raises:
        TypeError: the model is none of these, or takes patches in place of images, as SigLIP 2; an image is no
            picture, path or tensor.
        ValueError: pictures are given and nothing to preprocess them with.
    """
    images = _tensors(model, image, preprocess).to(next(model.parameters()).device)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            origin, grid = _origin(model, images)
    finally:
        model.train(training)
    shown = _shown(model, images).float().cpu()
    rows = torch.cat((shown, painted(shown, origin.cpu(), grid)), dim=3)
    pixels = (torch.cat(list(rows), dim=1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())


def painted(images: Tensor, origin: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images whose patches show the mean colour of their token, with lines between tokens.

    Args:
        images: ``[B, 3, H', W']`` in [0, 1].
        origin: ``[B, H·W]`` the token of each patch.
        grid: patches in a column and in a row, H and W.

    Returns:
        ``[B, 3, H', W']`` in [0, 1]; pixels beyond the last whole patch are black.
    """
    height, width = grid
    rows, columns = images.shape[2] // height, images.shape[3] // width
    patches = F.avg_pool2d(images, (rows, columns)).flatten(2)
    tokens = int(origin.max()) + 1
    index = origin[:, None].expand_as(patches)
    total = patches.new_zeros(*patches.shape[:2], tokens).scatter_add_(2, index, patches)
    count = patches.new_zeros(*patches.shape[:2], tokens).scatter_add_(2, index, torch.ones_like(patches))
    mean = (total / count.clamp(min=1)).gather(2, index).unflatten(2, (height, width))
    picture = mean.repeat_interleave(rows, 2).repeat_interleave(columns, 3)
    token = origin.unflatten(1, (height, width)).repeat_interleave(rows, 1).repeat_interleave(columns, 2)
    edge = torch.zeros_like(token, dtype=torch.bool)
    edge[:, 1:] |= token[:, 1:] != token[:, :-1]
    edge[:, :, 1:] |= token[:, :, 1:] != token[:, :, :-1]
    picture = torch.where(edge[:, None], 0.5 * picture, picture)
    return F.pad(picture, (0, images.shape[3] - columns * width, 0, images.shape[2] - rows * height))


def _tensors(model: nn.Module, image: Any, preprocess: Callable[[Image.Image], Tensor] | None) -> Tensor:
    """``[B, 3, H, W]`` from whatever was given."""
    if isinstance(image, Tensor):
        if image.dim() not in (3, 4):
            raise ValueError(f"image: expected [3, H, W] or [B, 3, H, W], got shape {list(image.shape)}")
        return image if image.dim() == 4 else image[None]
    if isinstance(image, Sequence) and not isinstance(image, str):
        return torch.cat([_tensors(model, one, preprocess) for one in image])
    if isinstance(image, (str, Path)):
        with Image.open(image) as opened:
            return _tensors(model, opened.convert("RGB"), preprocess)
    if not isinstance(image, Image.Image):
        raise TypeError(f"image: expected a PIL image, a path or a tensor, got {type(image).__name__}")
    preprocess = preprocess or getattr(model, "preprocess", None)
    if preprocess is None:
        raise ValueError(f"preprocess: expected what {type(model).__name__} preprocesses pictures with, got None")
    return preprocess(image)[None]


def _origin(model: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """``[B, H·W]`` the token of each patch, and the grid of the patches."""
    if isinstance(model, MLIP):
        return model.encode_image_tokens(images)[0].origin, model.visual.grid
    visual = _patched(model)
    forward = visual.forward_merged
    if isinstance(visual, timm.MergingModel):
        prefix, grid = visual.num_prefix_tokens, tuple(visual.patch_embed.dynamic_feat_size(tuple(images.shape[2:])))
    elif hasattr(visual, "grid_size"):
        prefix, grid = 1, tuple(visual.grid_size)
    else:
        prefix, grid, forward = visual.prefix_tokens, visual.grid, partial(_encoded, model, visual)
    _, _, plan = forward(images)
    if plan is None:
        return torch.arange(grid[0] * grid[1]).expand(len(images), -1), grid
    return plan.track()[:, prefix:] - prefix, grid


def _patched(model: nn.Module) -> Any:
    """The part of a model that merges."""
    for module in model.modules():
        if isinstance(module, timm.MergingModel) or hasattr(module, "forward_merged"):
            return module
    raise TypeError(
        f"model: expected an MLIP, or a model patched by mlip_kernels.patch.timm, .open_clip or .transformers, got"
        f" {type(model).__name__}"
    )


def _encoded(model: nn.Module, encoder: Any, images: Tensor) -> tuple[Tensor, Tensor | None, Any]:
    """What the vision encoder of a model of transformers makes of images."""
    owner = next(module for module in model.modules() if getattr(module, "encoder", None) is encoder)
    if encoder.grid is None:
        raise TypeError(f"model: expected one that takes images, got {type(owner).__name__}, which takes patches")
    given: list[Any] = []
    catch = encoder.register_forward_pre_hook(lambda _, *inputs: given.append(inputs), with_kwargs=True)
    try:
        owner(images)
    finally:
        catch.remove()
    (arguments, named), *_ = given
    return encoder.forward_merged(*arguments, **named)


def _shown(model: nn.Module, images: Tensor) -> Tensor:
    """Images in [0, 1]: by the model's own normalisation where it is known, else from darkest to brightest."""
    found: list[Any] = [{"mean": CLIP_MEAN, "std": CLIP_STD}] if isinstance(model, MLIP) else []
    for module in model.modules():
        found += [getattr(module, name, None) for name in ("preprocess_cfg", "pretrained_cfg")]
        kind: Any = getattr(getattr(module, "config", None), "model_type", None)
        found.append(OF_TRANSFORMERS.get(kind))
    for known in found:
        if isinstance(known, dict) and known.get("mean") and known.get("std"):
            mean, std = (images.new_tensor(known[name]).reshape(1, -1, 1, 1) for name in ("mean", "std"))
            return (images * std + mean).clamp(0, 1)
    lowest, highest = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (images - lowest) / (highest - lowest).clamp(min=torch.finfo(images.dtype).tiny)
