"""Cross-entropy over the rows, or over the rows and columns, of one matrix of logits, in plain PyTorch.

The definition is `pair_cross_entropy`. What runs on every device is `pair_cross_entropy_and_terms` and its backward,
which walk over the rows a few at a time: ``torch.nn.functional.cross_entropy`` on a ``[B, B]`` matrix and its transpose
keeps two more ``[B, B]`` matrices of log-probabilities for backward, this keeps none.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_kernels.merging.plain import accumulation_dtype

CHUNK_ELEMENTS = 2**20
"""Logits in work at a time (4 MiB in float32): they stay in cache, and no temporary grows with the square of B."""


def pair_cross_entropy(logits: Tensor, labels: Tensor, both: bool, label_smoothing: float) -> Tensor:
    """Sum over rows of their cross-entropy, or the mean of that and the same over columns; differentiable, any order.

    0-d in float32, or float64 for float64 logits. A label that names no column raises RuntimeError on CPUs; where its
    value is not to be read, the loss is NaN, as in the kernels.
    """
    wide = logits.to(accumulation_dtype(logits.dtype))
    labels, named = _named(labels, logits.shape[1])
    loss = F.cross_entropy(wide, labels, reduction="sum", label_smoothing=label_smoothing)
    if both:
        loss = (loss + F.cross_entropy(wide.t(), labels, reduction="sum", label_smoothing=label_smoothing)) / 2
    return loss if named is None else torch.where(named.all(), loss, torch.nan)


def pair_cross_entropy_and_terms(
    logits: Tensor, labels: Tensor, both: bool, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and for each row and each column its largest logit and the log of the sum of exponentials below it.

    ``[2, B]`` and ``[2, C]``, the latter ``[2, 0]`` unless ``both``. The sum of the two is the log-sum-exp; apart, they
    give small losses of large logits without cancellation.
    """
    rows, columns = logits.shape
    labels, named = _named(labels, columns)
    dtype = accumulation_dtype(logits.dtype)
    row_terms = logits.new_empty(2, rows, dtype=dtype)
    column_terms = logits.new_zeros(2, columns if both else 0, dtype=dtype)
    if both and rows:
        column_terms[0] = logits.amax(0)
    lost = torch.zeros_like(column_terms[1])  # low bits of the column sums, which grow by many small steps (Kahan)
    row_distances, column_distances = [], []  # sums over each part of how far logits lie below the largest

    for part in _parts(rows, columns):
        wide = logits[part].to(dtype)
        row_terms[0, part] = wide.amax(1)
        below = wide - row_terms[0, part, None]
        if label_smoothing:
            row_distances.append(_sum(below.sum(1)))
        row_terms[1, part] = below.exp_().sum(1).log_()
        if both:
            below = wide - column_terms[0]
            if label_smoothing:
                column_distances.append(_sum(below.sum(1)))
            step = below.exp_().sum(0) - lost
            total = column_terms[1] + step
            lost = (total - column_terms[1]).sub_(step)
            column_terms[1] = total
    column_terms[1].log_()

    own = logits.gather(1, labels[:, None]).squeeze(1).to(dtype)
    loss = _total(row_terms, own, row_distances, columns, label_smoothing)
    if both:
        own = logits.gather(0, labels[None]).squeeze(0).to(dtype)
        loss = (loss + _total(column_terms, own, column_distances, rows, label_smoothing)) / 2
    loss = loss.to(dtype)
    return loss if named is None else torch.where(named.all(), loss, torch.nan), row_terms, column_terms


def pair_cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_terms: Tensor,
    column_terms: Tensor,
    both: bool,
    label_smoothing: float,
) -> Tensor:
    """``softmax(row) + softmax(column) - 2 target``, halved, or ``softmax(row) - target``, in the dtype of the logits.

    The target of a row is ``1 - s`` at its label and ``s / C`` more everywhere, s being the smoothing.
    """
    rows, columns = logits.shape
    labels, _ = _named(labels, columns)
    weight = grad.to(row_terms.dtype) / (2 if both else 1)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for part in _parts(rows, columns):
        wide = logits[part].to(row_terms.dtype)
        chunk = (wide - row_terms[0, part, None]).sub_(row_terms[1, part, None])
        _probabilities_less_target(chunk, 1, labels[part, None], None, columns, label_smoothing)
        if both:
            down = (wide - column_terms[0]).sub_(column_terms[1])
            row = labels - part.start
            inside = (row >= 0) & (row < down.shape[0])
            row = row.clamp(0, down.shape[0] - 1)
            _probabilities_less_target(down, 0, row[None], inside, rows, label_smoothing)
            chunk += down
        gradient[part] = chunk.mul_(weight)
    return gradient


def _probabilities_less_target(
    logarithms: Tensor, dim: int, label: Tensor, inside: Tensor | None, classes: int, label_smoothing: float
) -> None:
    """Turn log-probabilities into probabilities minus targets, in place, the classes running along ``dim``.

    ``label`` holds one index a line, which is the target where ``inside`` is true. No element is named twice, so the
    order of writing does not matter. ``expm1`` keeps what is left of a probability near 1 when 1 is subtracted.
    """
    own = logarithms.gather(dim, label)
    difference = logarithms.exp_()
    if label_smoothing:
        difference -= label_smoothing / classes
    hit = own.expm1_().add_(label_smoothing - label_smoothing / classes)
    if inside is not None:
        hit = torch.where(inside, hit, difference.gather(dim, label))
    difference.scatter_(dim, label, hit)


def values_can_be_read(tensor: Tensor) -> bool:
    """Whether looking at the values of a tensor costs no synchronisation and no trace hides them."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active() and torch._C._len_torch_dispatch_stack() == 0


def _named(labels: Tensor, columns: int) -> tuple[Tensor, Tensor | None]:
    """Labels that can be used as indices, and which of them name a column; None where all were seen to.

    ``torch.nn.functional.cross_entropy`` would leave out -100, and indexing on a GPU with any other one stops the
    process.
    """
    named = (labels >= 0) & (labels < columns)
    if not values_can_be_read(labels):
        return labels.clamp(0, max(columns - 1, 0)), named
    if not bool(named.all()):
        raise RuntimeError(f"labels: expected numbers from 0 to {columns - 1}, got {labels[~named][0].item()}")
    return labels, None


def _parts(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _total(terms: Tensor, own: Tensor, distances: list[Tensor], classes: int, label_smoothing: float) -> Tensor:
    """Sum of the losses, given the logits of the labels and the sums of distances from the largest logits."""
    loss = _sum(terms[1] + (terms[0] - own))
    if label_smoothing and distances:
        even = _sum(terms[1]) - _sum(torch.stack(distances)) / classes
        loss = (1 - label_smoothing) * loss + label_smoothing * even
    return loss


def _sum(values: Tensor) -> Tensor:
    """Sum to one number, in float64 where the device has it.

    In pieces of fixed size, because torch splits longer sums by the number of threads.
    """
    dtype = values.dtype if values.device.type == "mps" else torch.float64
    pieces = [piece.sum(dtype=dtype) for piece in values.split(2**14)]
    return torch.stack(pieces).sum() if len(pieces) > 1 else pieces[0]
