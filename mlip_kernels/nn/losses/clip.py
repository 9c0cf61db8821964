"""The loss of CLIP on one feature an image and one a text."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mlip_kernels._arguments import check_flag, check_number
from mlip_kernels.contrastive.pair_cross_entropy import pair_cross_entropy
from mlip_kernels.nn.losses.gather import all_gather
from mlip_kernels.nn.losses.paired import PairedLoss, check_no_horovod


class ClipLoss(PairedLoss):
    """Symmetric cross-entropy over the cosine similarities of all pairs (Radford et al., ICML 2021, figure 3).

    Constructor, call, values and gradients are those of ``open_clip.loss.ClipLoss``. Saved for backward, besides the
    features: one matrix of logits (two rectangular ones with ``local_loss`` over ranks), where open_clip keeps two of
    log-probabilities (`mlip_kernels.pair_cross_entropy`).

    Args:
        local_loss: each rank scores its own rows against all ranks and returns its part of the loss, the mean of
            which over ranks is the loss of the whole batch; otherwise each rank computes the whole loss.
        gather_with_grad: gradients flow back to the ranks that features were gathered from. With it, gradients
            averaged over ranks equal those of one process on the whole batch, for either ``local_loss``; without it,
            they lack the parts that other ranks computed.
        cache_labels: keep the labels between calls.
        rank, world_size: of this process among those that share the batch, through ``torch.distributed``.
        use_horovod: only False.
        label_smoothing: in [0, 1], as ``torch.nn.functional.cross_entropy`` has it, in both directions. open_clip has
            none.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(cache_labels, rank, world_size)
        check_no_horovod(use_horovod)
        self.use_horovod = False
        self.label_smoothing = check_number("label_smoothing", label_smoothing, minimum=0.0, maximum=1.0)
        self.local_loss = check_flag("local_loss", local_loss)
        self.gather_with_grad = check_flag("gather_with_grad", gather_with_grad)

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """Column of the matching pair for each of ``num_logits`` rows."""
        local = self.world_size > 1 and self.local_loss
        return self._class_labels(device, num_logits, first=num_logits * self.rank if local else 0)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits per image and per text: ``[B, ranks·B]`` if local, else both ``[ranks·B, ranks·B]``."""
        if self.world_size > 1:
            gradient = "all" if self.gather_with_grad else "none" if self.local_loss else "local"
            all_images = all_gather(image_features, gradient=gradient)
            all_texts = all_gather(text_features, gradient=gradient)
        else:
            all_images, all_texts = image_features, text_features
        one_sided = self.local_loss and self.world_size > 1
        per_image = logit_scale * (image_features if one_sided else all_images) @ all_texts.T
        if logit_bias is not None:
            per_image += logit_bias
        if not one_sided:
            return per_image, per_image.T
        per_text = logit_scale * text_features @ all_images.T
        if logit_bias is not None:
            per_text += logit_bias
        return per_image, per_text

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
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
        per_image, per_text = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        labels = self.get_ground_truth(per_image.device, per_image.shape[0])
        cross_entropy = functools.partial(pair_cross_entropy, labels=labels, label_smoothing=self.label_smoothing)
        if self._logits_are_one_matrix():
            loss = cross_entropy(per_image)
        else:
            loss = (cross_entropy(per_image, directions="rows") + cross_entropy(per_text, directions="rows")) / 2
        return {"contrastive_loss": loss} if output_dict else loss

    def _logits_are_one_matrix(self) -> bool:
        """Whether `get_logits` returns a matrix and its transpose; that of a subclass need not."""
        return type(self).get_logits is ClipLoss.get_logits and not (self.local_loss and self.world_size > 1)
