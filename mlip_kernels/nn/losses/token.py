"""The contrastive loss on tokens: cross-entropy over the mean of maximal similarities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_kernels._arguments import check_choice, check_flag, check_number
from mlip_kernels.contrastive.pair_cross_entropy import pair_cross_entropy
from mlip_kernels.contrastive.token_logits import check_token_logits
from mlip_kernels.nn.losses.gather import (
    all_gather,
    all_gather_ragged,
    check_equal_on_all_ranks,
    check_process_group,
    exchange_blocks,
    sizes_by_rank,
    warn_if_local,
)
from mlip_kernels.nn.losses.paired import PairedLoss, check_no_horovod
from mlip_kernels.nn.losses.token_ring import Shards, ordered_logits, ring_logits


class TokenContrastiveLoss(PairedLoss):
    """Symmetric cross-entropy over `token_logits` (Yao et al., "FILIP", ICLR 2022, eq. 2 to 6).

    Over ranks, only the tokens, masks and weights of the *texts* travel: each rank computes both directions for its
    own images against all texts, and the per-text logits, one number a pair, are exchanged instead of image tokens.
    The mean of the ranks' losses is the loss of the whole batch, and gradients averaged over ranks (as DDP does) are
    those of one process. Ranks may bring batches of different sizes, even none, and texts of different lengths: every
    pair of the whole batch counts the same.

    Args:
        local_loss: return this rank's part of the loss, the sum over its own pairs times ranks / pairs on all ranks;
            otherwise the mean over ranks, the same number on each, with the same gradients after averaging.
        gather_with_grad: gradients flow back to the ranks that texts and logits came from. Without it they lack the
            parts that other ranks computed, as in `ClipLoss`.
        cache_labels: keep the labels between calls.
        rank, world_size: of this process among those that share the batch, through ``torch.distributed``.
        use_horovod: only False.
        label_smoothing: in [0, 1], as ``torch.nn.functional.cross_entropy`` has it, in both directions.
        gather: how the texts travel, with the same result: ``"all"`` at once, or ``"ring"``, from rank to rank, where
            each holds one remote shard at a time and computes its logits once more in backward.

    The arguments before ``label_smoothing`` are those of `ClipLoss` in the same order; the first two are on by default,
    so that the gradients are right unless asked otherwise.

    Memory per rank, for R ranks with B pairs each, C = R·B, and e bytes an element of the tokens:

    * both ways: two matrices of logits, ``8·B·C`` bytes, saved for backward, and two of their gradients in backward;
    * ``"all"``: the texts of all ranks, ``e·C·M·D``, and in backward their gradient in float32, ``4·C·M·D`` (each
      twice for a moment); what `token_logits` saves for ``[B, C]`` pairs; ragged shards are padded to the largest;
    * ``"ring"``: one remote shard, ``e·B·M·D``, in backward with its gradient, ``4·B·M·D`` (each twice while it is
      passed on); what `token_logits` saves for ``[B, B]`` pairs, in backward only. Saved are only the arguments.
    """

    def __init__(
        self,
        local_loss: bool = True,
        gather_with_grad: bool = True,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        label_smoothing: float = 0.0,
        gather: str = "all",
    ) -> None:
        super().__init__(cache_labels, rank, world_size)
        check_no_horovod(use_horovod)
        check_choice("gather", gather, ("all", "ring"))
        self.local_loss = check_flag("local_loss", local_loss)
        self.gather_with_grad = check_flag("gather_with_grad", gather_with_grad)
        self.use_horovod = False
        self.label_smoothing = check_number("label_smoothing", label_smoothing, minimum=0.0, maximum=1.0)
        self.gather = gather

    def get_ground_truth(self, device: torch.device, num_logits: int, first: int | None = None) -> Tensor:
        """Column of the matching pair for each of ``num_logits`` rows.

        ``first`` is that of the first row; None means that all ranks have ``num_logits``.
        """
        return self._class_labels(device, num_logits, first=num_logits * self.rank if first is None else first)

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
        shards: Shards | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits per image and per text of this rank's rows against all: both ``[B, C]``, C pairs being on all ranks.

        ``shards`` is what the ranks hold, which is found out in one small collective where it is None.
        """
        texts, images = (text_tokens, text_weight, text_mask), (image_tokens, image_weight, image_mask)
        if self.world_size == 1:
            return ordered_logits(*texts, *images, logit_scale, logit_bias)
        shards = shards or self._shards(*texts)
        gradient = "all" if self.gather_with_grad else "local"
        if self.gather == "ring":
            if image_tokens.dtype != text_tokens.dtype:  # under autocast; backward, outside of it, would refuse them
                dtype = torch.promote_types(image_tokens.dtype, text_tokens.dtype)
                texts, images = (text_tokens.to(dtype), *texts[1:]), (image_tokens.to(dtype), *images[1:])
            per_image, per_text = ring_logits(shards, gradient, *texts, *images, logit_scale, logit_bias)
        else:
            texts = self._gathered(shards, gradient, *texts)
            per_image, per_text = ordered_logits(*texts, *images, logit_scale, logit_bias)
        return per_image, exchange_blocks(per_text, shards.rows, gradient=gradient)

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
            image_tokens: ``[B, N, D]``, text_tokens ``[B, M, D]``; masks and weights as for `token_logits`. B, N and M
                may differ between ranks.
            logit_scale: factor on the logits, a number or a tensor of one element (CLIP's exponentiated temperature).
            logit_bias: added to the logits, a number or a tensor of one element, or None.
            output_dict: return a dictionary as open_clip's trainer wants it.

        Raises:
            TypeError, ValueError: as `token_logits`; also if images and texts differ in number, if D, the size of an
                element, the presence of a text mask or weight, or the need of a gradient differs between ranks, or if
                there is no pair on any of them.
            RuntimeError: ``world_size`` is above 1 and there is no process group.
        """
        checked = check_token_logits(
            image_tokens,
            text_tokens,
            image_mask=image_mask,
            text_mask=text_mask,
            image_weight=image_weight,
            text_weight=text_weight,
            scale=logit_scale,
            bias=logit_bias,
            names=("logit_scale", "logit_bias"),
        )
        output_dict = check_flag("output_dict", output_dict)
        pairs = text_tokens.shape[0]
        if pairs != image_tokens.shape[0]:
            raise ValueError(f"text_tokens: expected one text an image, B = {image_tokens.shape[0]}, got {pairs}")
        warn_if_local(self.world_size)
        shards = Shards((pairs,), (text_tokens.shape[1],))
        if self.world_size > 1:
            shards = self._shards(text_tokens, text_weight, text_mask)
        if sum(shards.rows) == 0:
            raise ValueError("batch size: expected at least one pair, got 0: the mean over no pairs is undefined")

        matrices = self.get_logits(
            image_tokens,
            text_tokens,
            checked.scale,
            checked.bias,
            image_mask=checked.image_mask,
            text_mask=checked.text_mask,
            image_weight=image_weight,
            text_weight=text_weight,
            shards=shards,
        )
        labels = self.get_ground_truth(image_tokens.device, pairs, shards.of(self.rank).start)
        losses = [
            pair_cross_entropy(m, labels, directions="rows", label_smoothing=self.label_smoothing, reduction="sum")
            for m in matrices
        ]
        loss = (losses[0] + losses[1]) * (self.world_size / (2 * sum(shards.rows)))
        if self.world_size > 1 and not self.local_loss:
            loss = all_gather(loss.unsqueeze(0), gradient="all" if self.gather_with_grad else "local").mean()
        return {"contrastive_loss": loss} if output_dict else loss

    def _shards(self, tokens: Tensor, weight: Tensor | None, mask: Tensor | None) -> Shards:
        """What every rank holds, having checked that it goes together."""
        check_process_group(self.rank, self.world_size)
        shape = {"local batch size": tokens.shape[0], "text tokens M": tokens.shape[1]}
        alike = {
            "token width D": tokens.shape[2],
            "bytes an element of text_tokens": tokens.element_size(),
            "text_mask given": int(mask is not None),
            "text_weight given": int(weight is not None),
            "text_tokens.requires_grad": int(tokens.requires_grad),
            "text_weight.requires_grad": int(weight is not None and weight.requires_grad),
        }
        found = sizes_by_rank({**shape, **alike}, tokens.device)
        rows, lengths = (found.pop(name) for name in shape)
        check_equal_on_all_ranks(found)
        return Shards(rows, lengths)

    def _gathered(
        self, shards: Shards, gradient: str, tokens: Tensor, weight: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens, weights and mask of all texts, padded to the longest; padding is masked."""
        if min(shards.lengths) < max(shards.lengths):
            padding = max(shards.lengths) - tokens.shape[1]
            real = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
            mask = F.pad(real, (0, padding))
            tokens = F.pad(tokens, (0, 0, 0, padding))
            weight = None if weight is None else F.pad(weight, (0, padding))

        def gathered(tensor: Tensor) -> Tensor:
            return all_gather_ragged(tensor, shards.rows, gradient=gradient)

        return (
            gathered(tokens),
            None if weight is None else gathered(weight),
            None if mask is None else gathered(mask),
        )
