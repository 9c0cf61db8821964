"""The sigmoid loss of SigLIP on one feature an image and one a text."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_kernels._arguments import check_choice, check_flag
from mlip_kernels.nn.losses.gather import all_gather, broadcast
from mlip_kernels.nn.losses.paired import PairedLoss
from mlip_kernels.nn.losses.ring import shift


class SigLipLoss(PairedLoss):
    """Pairwise sigmoid loss (Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, algorithm 1).

    Constructor, call, values and gradients are those of ``open_clip.loss.SigLipLoss``. Over ranks, each scores its
    own images against the texts of all, one rank's after the other's, and returns its part of the loss; the mean of
    the parts is the loss of the whole batch, and gradients averaged over ranks are those of one process. Smoothed
    labels have no meaning here, and ``label_smoothing`` is no argument.

    Args:
        cache_labels: keep the ±1 labels, ``[B, B]``, between calls.
        rank, world_size: of this process among those that share the batch, through ``torch.distributed``.
        dist_impl: how texts travel, with the same result: ``"bidir"``, also meant by None, around the ring in both
            directions at once; ``"shift"`` around it in one; ``"reduce"`` from each rank to all, one after the other;
            ``"gather"`` all at once, in one collective.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ) -> None:
        super().__init__(cache_labels, rank, world_size)
        check_choice("dist_impl", dist_impl, (None, "bidir", "shift", "reduce", "gather"))
        self.dist_impl = dist_impl or "bidir"

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """``[num_logits, num_logits]`` of -1, with 1 on the diagonal unless ``negative_only``."""
        key = (device, dtype, num_logits, negative_only)
        labels = self._labels.get(key)
        if labels is None:
            labels = torch.full((num_logits, num_logits), -1, device=device, dtype=dtype)
            if not negative_only:
                labels.fill_diagonal_(1)
            self._keep_labels(key, labels)
        return labels

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """``[B, C]`` logits of ``[B, D]`` images with ``[C, D]`` texts."""
        logits = logit_scale * image_features @ text_features.T
        if logit_bias is not None:
            logits += logit_bias
        return logits

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of ``[B, D]`` features of unit length, 0-d, or ``{"contrastive_loss": loss}``.

        ``logit_scale`` and ``logit_bias`` are finite numbers or tensors of one element.

        Raises:
            TypeError: a feature is no floating-point tensor, the two differ in dtype without autocast, or a scale or
                bias is no number.
            ValueError: shapes or devices do not match, here or between ranks, or there is no pair.
            RuntimeError: ``world_size`` is above 1 and there is no process group.
        """
        logit_scale, logit_bias = self._check_features(image_features, text_features, logit_scale, logit_bias)
        output_dict = check_flag("output_dict", output_dict)
        device, dtype, batch = image_features.device, image_features.dtype, image_features.shape[0]
        losses = []
        for own, texts in self._text_shards(text_features):
            logits = self.get_logits(image_features, texts, logit_scale, logit_bias)
            labels = self.get_ground_truth(device, dtype, batch, negative_only=not own)
            losses.append(-F.logsigmoid(labels * logits).sum() / batch)
        loss = torch.stack(losses).sum()
        return {"contrastive_loss": loss} if output_dict else loss

    def _text_shards(self, texts: Tensor) -> Iterator[tuple[bool, Tensor]]:
        """The texts of each rank, and whether they are this rank's own."""
        rank, ranks = self.rank, self.world_size
        if ranks > 1 and self.dist_impl == "gather":
            yield from ((owner == rank, shard) for owner, shard in enumerate(all_gather(texts).tensor_split(ranks)))
        elif ranks > 1 and self.dist_impl == "reduce":
            yield from ((owner == rank, broadcast(texts, owner)) for owner in range(ranks))
        else:
            yield True, texts
            onward = back = texts
            both_ways = (ranks - 1) // 2 if self.dist_impl == "bidir" else 0
            for _ in range(both_ways):
                onward, back = shift((onward, back), (1, -1))
                yield False, onward
                yield False, back
            for _ in range(ranks - 1 - 2 * both_ways):
                (onward,) = shift((onward,), (1,))
                yield False, onward
