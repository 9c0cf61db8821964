"""Losses of this package in Hugging Face's ``Trainer``.

    trainer = Trainer(model, args, train_dataset=pairs, compute_loss_func=contrastive_loss(model))

The model is a ``CLIPModel``, ``SiglipModel`` or ``Siglip2Model``, patched by `mlip_kernels.patch.transformers` or not.
Called without ``return_loss`` it computes no loss of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from mlip_kernels.nn import ClipLoss, SigLipLoss

__all__ = ["contrastive_loss"]


def contrastive_loss(model: nn.Module, loss: nn.Module | None = None) -> Callable[..., Tensor]:
    """What ``Trainer(compute_loss_func=…)`` takes: the loss of a batch of pairs from the outputs of the model.

    Args:
        model: the model that is trained, before the trainer wraps it. Its ``logit_scale``, and its ``logit_bias`` if it
            has one, are read at every call.
        loss: called as ``loss(image_features, text_features, logit_scale[, logit_bias])``. By default `SigLipLoss` for
            a model with a bias and `ClipLoss` for others, over all processes of an initialised group, with gradients
            that are right when they are averaged over processes.

    Raises:
        TypeError: the model has no ``logit_scale``; when called, the outputs have no embeddings of both sides.
    """
    owner: Any = model
    if not isinstance(getattr(model, "logit_scale", None), Tensor):
        raise TypeError(f"model: expected one with a logit_scale, as CLIPModel has it, got {type(model).__name__}")
    biased = getattr(model, "logit_bias", None) is not None
    if loss is None:
        grouped = dist.is_available() and dist.is_initialized()
        ranks: dict[str, Any] = {"rank": dist.get_rank(), "world_size": dist.get_world_size()} if grouped else {}
        loss = SigLipLoss(**ranks) if biased else ClipLoss(local_loss=True, gather_with_grad=True, **ranks)
    chosen = loss

    def compute(outputs: Any, labels: Any = None, num_items_in_batch: Any = None) -> Tensor:
        """The loss; ``labels`` and ``num_items_in_batch`` are the trainer's and not read."""
        embeddings = [getattr(outputs, name, None) for name in ("image_embeds", "text_embeds")]
        if not all(isinstance(one, Tensor) for one in embeddings):
            raise TypeError(
                f"outputs: expected image_embeds and text_embeds, got {type(outputs).__name__}; give the model"
                " pixel_values and input_ids"
            )
        return chosen(*embeddings, owner.logit_scale.exp(), *([owner.logit_bias] if biased else []))

    return compute
