"""What the losses over matching pairs share: their place among the ranks, their checks, their labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlip_kernels._arguments import (
    LARGEST_SIZE,
    check_flag,
    check_integer,
    check_same_device,
    check_same_dtype,
    check_scalar,
    check_shape,
    check_tensor,
)
from mlip_kernels.nn.losses.gather import (
    check_equal_on_all_ranks,
    check_process_group,
    sizes_by_rank,
    warn_if_local,
)


class PairedLoss(nn.Module):
    """A loss for batches in which row i of one side belongs to row i of the other."""

    def __init__(self, cache_labels: bool, rank: int, world_size: int) -> None:
        super().__init__()
        self.cache_labels = check_flag("cache_labels", cache_labels)
        self.world_size = check_integer("world_size", world_size, minimum=1, maximum=LARGEST_SIZE)
        self.rank = check_integer("rank", rank, minimum=0, maximum=self.world_size - 1)
        warn_if_local(self.world_size)
        self._labels: dict[tuple[object, ...], Tensor] = {}

    def _check_batch(self, sizes: dict[str, int], device: torch.device) -> None:
        """Raise unless there is a pair and, in a process group, every rank brings the same ``sizes``."""
        warn_if_local(self.world_size)
        if self.world_size > 1:
            check_process_group(self.rank, self.world_size)
            check_equal_on_all_ranks(sizes_by_rank(sizes, device))
        if sizes["local batch size"] == 0:
            raise ValueError("local batch size: expected at least one pair, got 0: the mean over no pairs is undefined")

    def _check_features(
        self, image_features: object, text_features: object, logit_scale: object, logit_bias: object
    ) -> tuple[float | Tensor, float | Tensor | None]:
        """Raise unless the features go together; return scale and bias as numbers or 0-d tensors."""
        images = check_tensor("image_features", image_features, layout="[B, D]")
        texts = check_tensor("text_features", text_features, layout="[B, D]")
        check_shape("text_features", texts, images.shape, "[B, D] of image_features")
        check_same_device("text_features", texts, "image_features", images)
        check_same_dtype("text_features", texts, "image_features", images)
        scale = check_scalar("logit_scale", logit_scale, "image_features", images)
        bias = None if logit_bias is None else check_scalar("logit_bias", logit_bias, "image_features", images)
        self._check_batch({"local batch size": images.shape[0], "feature width": images.shape[1]}, images.device)
        return scale, bias

    def _class_labels(self, device: torch.device, count: int, *, first: int) -> Tensor:
        """Indices of the matching pairs for `pair_cross_entropy`: ``count`` from ``first`` on."""
        key = (device, count, first)
        labels = self._labels.get(key)
        if labels is None:
            labels = torch.arange(first, first + count, device=device)
            self._keep_labels(key, labels)
        return labels

    def _keep_labels(self, key: tuple[object, ...], labels: Tensor) -> None:
        """Remember the labels of the last batch, if the user wants it; those of a positive and a negative block."""
        if self.cache_labels:
            if len(self._labels) > 1:
                self._labels.clear()
            self._labels[key] = labels


def check_no_horovod(use_horovod: object) -> None:
    """Raise if Horovod is asked for: the losses communicate through torch.distributed only."""
    if check_flag("use_horovod", use_horovod):
        raise ValueError("use_horovod: expected False (ranks communicate through torch.distributed), got True")
