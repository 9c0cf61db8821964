"""Cross-entropy over the rows and columns of one matrix of logits: the loss of CLIP without further matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlip_kernels._arguments import (
    autocast_enabled,
    check_choice,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
)
from mlip_kernels._library import define_kernel
from mlip_kernels._operator import Operator, define_backward
from mlip_kernels.contrastive import plain
from mlip_kernels.merging.plain import accumulation_dtype


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
            ValueError on CPUs; on GPUs, where looking would cost a
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
    return _pair_cross_entropy(logits, labels, directions, label_smoothing, reduction)


class PairCrossEntropy(Operator):
    """``PairCrossEntropy.apply(logits, labels=None, directions="both", label_smoothing=0.0, reduction="mean")``.

    See `pair_cross_entropy`. Saved for backward: the logits, the labels, and two float32 numbers a row and two a
    column. The second derivative raises.
    """

    schema = (
        "pair_cross_entropy(Tensor logits, Tensor? labels, str directions, float label_smoothing, str reduction,"
        " bool autocast) -> (Tensor loss, Tensor row_terms, Tensor column_terms)"
    )
    kernels = False
    results, differentiable = 1, 1

    @staticmethod
    def check(
        logits: Tensor,
        labels: Tensor | None = None,
        directions: str = "both",
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> tuple[Any, ...]:
        check_tensor("logits", logits, layout="[B, C]")
        check_choice("directions", directions, ("both", "rows"))
        check_choice("reduction", reduction, ("mean", "sum"))
        label_smoothing = float(check_number("label_smoothing", label_smoothing, minimum=0.0, maximum=1.0))
        rows, columns = logits.shape
        if directions == "both":
            check_shape("logits", logits, (rows, rows), "[B, B]")
        elif columns < 1 or (labels is None and columns < rows):
            wanted = "C >= 1" if labels is not None else "C >= B and C >= 1"
            raise ValueError(f"logits: expected [B, C] with {wanted}, got shape {list(logits.shape)}")
        if labels is not None:
            check_tensor("labels", labels, layout="[B]", dtypes=(torch.int64,))
            check_shape("labels", labels, (rows,), "[B]")
            check_same_device("labels", labels, "logits", logits)
        return logits, labels, directions, label_smoothing, reduction, autocast_enabled(logits.device.type)

    @staticmethod
    def compute(
        logits: Tensor, labels: Tensor | None, directions: str, label_smoothing: float, reduction: str, autocast: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        named = _labels(logits, labels)
        try:
            loss, *terms = _forward(logits, named, directions == "both", label_smoothing)
        except (RuntimeError, IndexError) as failure:
            _raise_for_labels(named, logits.shape[1], failure)
            raise
        return _reduced(loss, logits, reduction, autocast), *terms

    @staticmethod
    def fake(
        logits: Tensor, labels: Tensor | None, directions: str, label_smoothing: float, reduction: str, autocast: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        (rows, columns), dtype = logits.shape, accumulation_dtype(logits.dtype)
        row_terms = logits.new_empty(2, rows, dtype=dtype)
        loss = logits.new_empty((), dtype=dtype if autocast else logits.dtype)
        return loss, row_terms, row_terms.new_empty(2, columns if directions == "both" else 0)

    @staticmethod
    def plain(
        logits: Tensor, labels: Tensor | None, directions: str, label_smoothing: float, reduction: str, autocast: bool
    ) -> Tensor:
        named = _labels(logits, labels)
        try:
            loss = plain.pair_cross_entropy(logits, named, directions == "both", label_smoothing)
        except (RuntimeError, IndexError) as failure:
            _raise_for_labels(named, logits.shape[1], failure)
            raise
        return _reduced(loss, logits, reduction, autocast)

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, labels, directions, ctx.label_smoothing, ctx.reduction, _ = inputs
        ctx.both = directions == "both"
        _, row_terms, column_terms = output
        ctx.save_for_backward(logits, labels, row_terms, column_terms)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor | None, *rest: Any) -> Tensor | None:
        if grad is None:
            return None
        logits, labels, row_terms, column_terms = ctx.saved_tensors
        grad = grad.to(row_terms.dtype)
        if ctx.reduction == "mean":
            grad = grad / logits.shape[0]
        named = _labels(logits, labels)
        return _backward(grad, logits, named, row_terms, column_terms, ctx.both, ctx.label_smoothing)


def _labels(logits: Tensor, labels: Tensor | None) -> Tensor:
    """The labels, or the diagonal."""
    return torch.arange(logits.shape[0], device=logits.device) if labels is None else labels


def _reduced(loss: Tensor, logits: Tensor, reduction: str, autocast: bool) -> Tensor:
    rows = logits.shape[0]
    if reduction == "mean":
        loss = loss / rows if rows else loss * torch.nan
    return loss if autocast else loss.to(logits.dtype)


def _raise_for_labels(labels: Tensor, columns: int, failure: Exception) -> None:
    """Say which label names no column, if that may be why a loss was refused."""
    if plain.values_can_be_read(labels):
        wrong = labels[(labels < 0) | (labels >= columns)].tolist()
        if wrong:
            raise ValueError(f"labels: expected numbers from 0 to {columns - 1}, got {wrong[0]}") from failure


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


_pair_cross_entropy = PairCrossEntropy.call
_forward = define_kernel(
    "contrastive_pair_cross_entropy(Tensor logits, Tensor labels, bool both, float label_smoothing)"
    " -> (Tensor loss, Tensor row_terms, Tensor column_terms)",
    reference=plain.pair_cross_entropy_and_terms,
    triton="mlip_kernels.triton.contrastive.pair_cross_entropy:pair_cross_entropy",
)
_backward = define_backward(
    "contrastive_pair_cross_entropy_backward(Tensor grad, Tensor logits, Tensor labels, Tensor row_terms,"
    " Tensor column_terms, bool both, float label_smoothing) -> Tensor grad_logits",
    compute=plain.pair_cross_entropy_backward,
    fake=_fake_backward,
    triton="mlip_kernels.triton.contrastive.pair_cross_entropy:pair_cross_entropy_backward",
)
