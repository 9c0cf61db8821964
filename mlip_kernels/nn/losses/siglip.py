"""The sigmoid loss of SigLIP on one feature an image and one a text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_kernels.nn.losses.gather import all_gather
from mlip_kernels.nn.losses.paired import PairedLoss
from mlip_kernels.ops.arguments import check_choice


class SigLipLoss(PairedLoss):
    """Pairwise sigmoid loss (Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, algorithm 1).

    Constructor, call, values and gradients are those of ``open_clip.loss.SigLipLoss``. Over ranks, each scores its
    own images against the texts of all and returns its part of the loss; the mean of the parts is the loss of the
    whole batch, and gradients averaged over ranks are those of one process.

    Args:
        cache_labels: keep the ±1 labels, ``[B, ranks·B]``, between calls.
        rank, world_size: of this process among those that share the batch, through ``torch.distributed``.
        dist_impl: how texts travel: ``"gather"``, also meant by None. It is one all-gather; open_clip's rings
            (``"bidir"``, ``"shift"``) and ``"reduce"`` compute the same loss and are not offered.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ) -> None:
        super().__init__(cache_labels, rank, world_size)
        check_choice("dist_impl", dist_impl, (None, "gather"))
        self.dist_impl = dist_impl or "gather"

    def get_ground_truth(self, device: torch.device, dtype: torch.dtype, num_logits: int) -> Tensor:
        """``[B, ranks·B]`` with 1 for this rank's matching pairs and -1 elsewhere, B being ``num_logits``."""
        shape = (num_logits, self.world_size * num_logits)
        labels = self._labels.get(device)
        if labels is None or labels.dtype != dtype or labels.shape != shape:
            labels = torch.full(shape, -1, device=device, dtype=dtype)
            labels.diagonal(self.rank * num_logits).fill_(1)
            if self.cache_labels:
                self._labels[device] = labels
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
        return logits if logit_bias is None else logits + logit_bias

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of ``[B, D]`` features of unit length, 0-d, or ``{"contrastive_loss": loss}``.

        Raises:
            TypeError: a feature is no floating-point tensor.
            ValueError: shapes or devices do not match, here or between ranks, or there is no pair.
            RuntimeError: ``world_size`` is above 1 and there is no process group.
        """
        self._check_features(image_features, text_features)
        all_texts = all_gather(text_features) if self.world_size > 1 else text_features
        logits = self.get_logits(image_features, all_texts, logit_scale, logit_bias)
        labels = self.get_ground_truth(image_features.device, image_features.dtype, image_features.shape[0])
        loss = -F.logsigmoid(labels * logits).sum() / image_features.shape[0]
        return {"contrastive_loss": loss} if output_dict else loss
