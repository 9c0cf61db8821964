"""Cross-entropy over the rows and columns of one matrix of logits: the loss of CLIP without further matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlip_kernels._library import define, differentiate, plain_needed
from mlip_kernels.ops.arguments import (
    autocast_enabled,
    check_choice,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
)
from mlip_kernels.reference.contrastive.pair_cross_entropy import pair_cross_entropy as reference_pair_cross_entropy
from mlip_kernels.reference.contrastive.pair_cross_entropy import (
    pair_cross_entropy_and_terms,
    pair_cross_entropy_backward,
    values_can_be_read,
)
from mlip_kernels.reference.merging.weighted_mean import accumulation_dtype


def pair_cross_entropy(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    directions: str = "both",
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """``(cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2`` from one matrix, or its first term.

    Equal to ``torch.nn.functional.cross_entropy`` in value, gradient and dtype. What differs is memory: that keeps the
    log-probabilities of both directions, two more matrices, and adds two gradients; here the logits themselves are
    kept, and backward makes one gradient, ``softmax(row) + softmax(column) - 2 · target``, halved.

    Args:
        logits: ``[B, C]``; float32, bfloat16, float16 or float64. ``B = C`` for both directions.
        labels: ``[B]``, int64: the column that belongs to each row and, for both directions, also the row that belongs
            to each column. None means that pair i lies on the diagonal. A label that names no column, -100 too, raises
            ValueError on CPUs (RuntimeError where the call was compiled); on GPUs, where looking would cost a
            synchronisation, it makes the loss NaN.
        directions: ``"both"``, or ``"rows"`` where the other direction has a matrix of its own.
        label_smoothing: in [0, 1]; that share of each target is spread evenly over all classes.
        reduction: ``"mean"`` over B, NaN if B is 0, or ``"sum"``.

    Returns:
        The loss, 0-d: in the dtype of the logits, and float32 for half-precision logits under autocast. It is computed
        in float32 (float64 for float64) and rounded once.

    Hard input: as ``cross_entropy``. A logit of -inf is a class that cannot be; it makes the loss infinite if it is a
    label, or with smoothing. A row or column with +inf, NaN or nothing but -inf gives NaN.

    Saved for backward: the logits, the labels, and two float32 numbers a row and two a column: ``16·B`` bytes for both
    directions (twice that for float64). Besides the gradient and such vectors, the forward pass allocates 8 bytes for
    every 64 logits (CPU; B < 2048: for every 16 at least, ``B²/2`` bytes in all), on GPUs for every 40 or so, while it
    runs. The second derivative raises RuntimeError (`mlip_kernels.use_reference` computes it). Bitwise the same for any
    number of threads.

    Raises:
        TypeError, ValueError: naming the argument, before anything is computed from it.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
    figure 3; Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7.
    """
    check_tensor("logits", logits, layout="[B, C]")
    check_choice("directions", directions, ("both", "rows"))
    check_choice("reduction", reduction, ("mean", "sum"))
    label_smoothing = float(check_number("label_smoothing", label_smoothing, minimum=0.0, maximum=1.0))
    (rows, columns), both = logits.shape, directions == "both"
    if both:
        check_shape("logits", logits, (rows, rows), "[B, B]")
    elif columns < 1 or (labels is None and columns < rows):
        wanted = "C >= 1" if labels is not None else "C >= B and C >= 1"
        raise ValueError(f"logits: expected [B, C] with {wanted}, got shape {list(logits.shape)}")
    if labels is None:
        labels = torch.arange(rows, device=logits.device)
    check_tensor("labels", labels, layout="[B]", dtypes=(torch.int64,))
    check_shape("labels", labels, (rows,), "[B]")
    check_same_device("labels", labels, "logits", logits)

    try:
        if plain_needed():
            loss = reference_pair_cross_entropy(logits, labels, both, label_smoothing)
        else:
            loss = _forward(logits, labels, both, label_smoothing)[0]
    except (RuntimeError, IndexError) as failure:
        # Kernels and reference look at labels where they read them, so that nobody has to read them twice.
        _raise_for_labels(labels, columns, failure)
        raise
    if reduction == "mean":
        loss = loss / rows if rows else loss * torch.nan
    return loss if autocast_enabled(logits.device.type) else loss.to(logits.dtype)


def _raise_for_labels(labels: Tensor, columns: int, failure: Exception) -> None:
    """Say which label names no column, if that may be why a loss was refused."""
    if values_can_be_read(labels):
        wrong = labels[(labels < 0) | (labels >= columns)].tolist()
        if wrong:
            raise ValueError(f"labels: expected numbers from 0 to {columns - 1}, got {wrong[0]}") from failure


def _fake_forward(logits: Tensor, labels: Tensor, both: bool, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    (rows, columns), dtype = logits.shape, accumulation_dtype(logits.dtype)
    row_terms = logits.new_empty(2, rows, dtype=dtype)
    return logits.new_empty((), dtype=dtype), row_terms, row_terms.new_empty(2, columns if both else 0)


def _fake_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_terms: Tensor,
    column_terms: Tensor,
    both: bool,
    label_smoothing: float,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_forward = define(
    "contrastive_pair_cross_entropy(Tensor logits, Tensor labels, bool both, float label_smoothing)"
    " -> (Tensor loss, Tensor row_terms, Tensor column_terms)",
    reference=pair_cross_entropy_and_terms,
    fake=_fake_forward,
    triton="mlip_kernels.triton.contrastive.pair_cross_entropy:pair_cross_entropy",
)
_backward = define(
    "contrastive_pair_cross_entropy_backward(Tensor grad, Tensor logits, Tensor labels, Tensor row_terms,"
    " Tensor column_terms, bool both, float label_smoothing) -> Tensor grad_logits",
    reference=pair_cross_entropy_backward,
    fake=_fake_backward,
    triton="mlip_kernels.triton.contrastive.pair_cross_entropy_backward:pair_cross_entropy_backward",
)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, bool, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, ctx.both, ctx.label_smoothing = inputs
    _, row_terms, column_terms = output
    ctx.mark_non_differentiable(row_terms, column_terms)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, row_terms, column_terms)


def _gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None, None, None]:
    if grad is None:
        return None, None, None, None
    return _backward(grad, *ctx.saved_tensors, ctx.both, ctx.label_smoothing), None, None, None


differentiate(
    "contrastive_pair_cross_entropy",
    setup_context=_save,
    backward=_gradients,
    through=("contrastive_pair_cross_entropy_backward",),
)
