"""The contrastive loss on tokens: cross-entropy over the mean of maximal similarities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_kernels.nn.losses.gather import all_gather
from mlip_kernels.nn.losses.paired import PairedLoss, check_no_horovod
from mlip_kernels.ops.contrastive import check_token_logits, token_logits


class TokenContrastiveLoss(PairedLoss):
    """Symmetric cross-entropy over `token_logits` (Yao et al., "FILIP", ICLR 2022, eq. 2 to 6).

    Over ranks, only the tokens, masks and weights of the *texts* are gathered: each rank computes both directions for
    its own images against all texts, and the per-text logits, one number a pair, are exchanged instead of image
    tokens. The mean of the ranks' losses is the loss of the whole batch, and gradients averaged over ranks (as DDP
    does) are those of one process.

    Args:
        local_loss: return this rank's part of the loss; otherwise the mean over ranks, the same number on each,
            with the same gradients after averaging.
        gather_with_grad: gradients flow back to the ranks that texts and logits were gathered from. Without it they
            lack the parts that other ranks computed, as in `ClipLoss`.
        cache_labels: keep the labels between calls.
        rank, world_size: of this process among those that share the batch, through ``torch.distributed``.
        use_horovod: only False.

    The arguments are those of `ClipLoss` in the same order; the first two are on by default, so that the gradients
    are right unless asked otherwise.
    """

    def __init__(
        self,
        local_loss: bool = True,
        gather_with_grad: bool = True,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__(cache_labels, rank, world_size)
        check_no_horovod(use_horovod)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """Column of the matching pair for each of ``num_logits`` rows."""
        return self._class_labels(device, num_logits, first=num_logits * self.rank)

    def get_logits(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_weight: Tensor | None = None,
        text_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits per image and per text of this rank's rows against all: both ``[B, ranks·B]``."""
        if self.world_size > 1:
            text_tokens = self._gather(text_tokens)
            text_mask = None if text_mask is None else self._gather(text_mask)
            text_weight = None if text_weight is None else self._gather(text_weight)
        per_image, per_text = token_logits(
            image_tokens,
            text_tokens,
            image_mask=image_mask,
            text_mask=text_mask,
            image_weight=image_weight,
            text_weight=text_weight,
            scale=logit_scale,
            bias=logit_bias,
        )
        if self.world_size > 1:
            # Here per_text has all texts but only this rank's images; gathered by image, its own texts are cut out.
            rows = slice(self.rank * per_image.shape[0], (self.rank + 1) * per_image.shape[0])
            per_text = self._gather(per_text.t())[:, rows].t()
        return per_image, per_text

    def forward(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_weight: Tensor | None = None,
        text_weight: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-d in float32 (float64 for float64 tokens), or ``{"contrastive_loss": loss}``.

        Args:
            image_tokens: ``[B, N, D]``, text_tokens ``[B, M, D]``; masks and weights as for `token_logits`.
            logit_scale: factor on the logits, a number or a tensor of one element (CLIP's exponentiated temperature).
            logit_bias: added to the logits, a number or a tensor of one element, or None.
            output_dict: return a dictionary as open_clip's trainer wants it.

        Raises:
            TypeError, ValueError: as `token_logits`; also if the batches differ, here or between ranks, if M or the
                presence of a text mask or weight differs between ranks, or if there is no pair.
            RuntimeError: ``world_size`` is above 1 and there is no process group.
        """
        optional = {
            "image_mask": image_mask,
            "text_mask": text_mask,
            "image_weight": image_weight,
            "text_weight": text_weight,
        }
        check_token_logits(image_tokens, text_tokens, scale=logit_scale, bias=logit_bias, **optional)
        if text_tokens.shape[0] != image_tokens.shape[0]:
            raise ValueError(
                f"text_tokens: expected one text an image, B = {image_tokens.shape[0]}, got {text_tokens.shape[0]}"
            )
        sizes = {
            "local batch size": text_tokens.shape[0],
            "text tokens M": text_tokens.shape[1],
            "token width D": text_tokens.shape[2],
            "text_mask given": int(text_mask is not None),
            "text_weight given": int(text_weight is not None),
        }
        self._check_batch(sizes, image_tokens.device)
        per_image, per_text = self.get_logits(image_tokens, text_tokens, logit_scale, logit_bias, **optional)
        labels = self.get_ground_truth(per_image.device, per_image.shape[0])
        loss = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        if self.world_size > 1 and not self.local_loss:
            loss = self._gather(loss.unsqueeze(0)).mean()
        return {"contrastive_loss": loss} if output_dict else loss

    def _gather(self, tensor: Tensor) -> Tensor:
        return all_gather(tensor, gradient="all" if self.gather_with_grad else "local")
