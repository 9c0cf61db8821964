"""The contrastive family in plain PyTorch: the definition of right.

Token-level logits are late interaction as in FILIP (Yao et al., "FILIP: Fine-grained Interactive Language-Image
Pre-Training", ICLR 2022, eq. 5 and 6), extended by masks on both sides and by weights that let a merged token count for
what it stands for. They are made of one primitive, `token_maxima`: everything that depends on pairs of tokens. Weights
are normalized before it, scale and bias act on its ``[B, C]`` results after it. What wins a maximum is written
down in maps of the smallest type that holds a token's index, from which `token_maxima_backward` computes the gradient
of one side.

The cross-entropy over the rows, or over the rows and columns, of one matrix of logits is `pair_cross_entropy`. What
runs on every device is `pair_cross_entropy_and_terms` and its backward, which walk over the rows a few at a time:
``torch.nn.functional.cross_entropy`` on a ``[B, B]`` matrix and its transpose keeps two more ``[B, B]`` matrices of
log-probabilities for backward, this keeps none.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_kernels.merging.plain import accumulation_dtype

SIMILARITIES_AT_A_TIME = 2**22
"""Similarities computed at a time (16 MiB in float32): they stay in cache, and memory stays flat in the batch."""
LOGITS_AT_A_TIME = 2**20
"""Logits in work at a time (4 MiB in float32): they stay in cache, and no temporary grows with the square of B."""

Maxima = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def token_logits(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    image_weight: Tensor | None = None,
    text_weight: Tensor | None = None,
    scale: float | Tensor = 1.0,
    bias: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `mlip_kernels.token_logits`.

    Differentiable by autograd, to any order. The similarities of a few images with all texts are computed at a time.
    Autograd keeps their two argmax maps, int64, and, where a weight needs a gradient, the maxima: ``8·B·C·(N + M)`` and
    another ``4·B·C·(N + M)`` bytes.
    """
    images, texts = in_one_dtype(image_tokens, text_tokens)
    image_normalized_weight, text_normalized_weight = (
        normalized_weights(images, image_mask, image_weight),
        normalized_weights(texts, text_mask, text_weight),
    )
    per_image, per_text, *_ = token_maxima(
        images, texts, image_mask, text_mask, image_normalized_weight, text_normalized_weight, False, False
    )
    return affine(per_image, scale, bias), affine(per_text, scale, bias)


def in_one_dtype(image_tokens: Tensor, text_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of two dtypes, as autocast makes them, in the wider one."""
    dtype = torch.promote_types(image_tokens.dtype, text_tokens.dtype)
    return image_tokens.to(dtype), text_tokens.to(dtype)


def normalized_weights(tokens: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    """``[B, N]``, each token's weight in the mean over its row: they sum to 1, or are all 0 where the weights do.

    Float32, or float64 where the tokens are; 0 for a masked token.
    """
    dtype = compute_dtype(tokens)
    if weight is None:
        if mask is None:
            return tokens.new_ones(tokens.shape[:2], dtype=dtype) / tokens.shape[1]
        return mask.contiguous() / mask.sum(dim=1, keepdim=True, dtype=dtype).clamp(min=1)
    weight = weight.to(dtype)
    if mask is not None:
        weight = weight.masked_fill(~mask, 0)
    total = weight.sum(dim=1, keepdim=True)
    return (weight / total.masked_fill(total == 0, 1)).masked_fill(total == 0, 0)


def compute_dtype(tokens: Tensor) -> torch.dtype:
    """Half precision is multiplied and accumulated in float32; float64 stays."""
    return torch.float64 if tokens.dtype == torch.float64 else torch.float32


def index_dtype(count: int) -> torch.dtype:
    """The smallest integer type that holds the index of one of ``count`` tokens and has operators in PyTorch."""
    return torch.uint8 if count <= 2**8 else torch.int16 if count <= 2**15 else torch.int32


def token_maxima(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    image_normalized_weight: Tensor,
    text_normalized_weight: Tensor,
    keep_best: bool,
    keep_maxima: bool,
) -> Maxima:
    """Weighted means of the best similarity of every token, for every pair of an image and a text.

    Args:
        image_tokens: ``[B, N, D]``, text_tokens ``[C, M, D]`` in the same dtype.
        image_mask, text_mask: ``[B, N]`` and ``[C, M]``, True where the token is real, or None.
        image_normalized_weight, text_normalized_weight: ``[B, N]`` and ``[C, M]`` from `normalized_weights`.
        keep_best, keep_maxima: what is wanted of the last four results; the others are empty.

    Returns:
        per_image: ``[B, C]``, ``Σ_n image_normalized_weight[b, n] · text_maxima[b, c, n]``.
        per_text: ``[C, B]``, ``Σ_m text_normalized_weight[c, m] · image_maxima[b, c, m]``.
        best_text: ``[B, C, N]`` in ``index_dtype(M)``, which token of the text is the best for each token of the image:
            the lowest index of equals. For a masked token of the image any token; where the whole text is masked, one
            of its masked tokens, so that a winner that is masked means that there is none.
        best_image: ``[B, C, M]`` in ``index_dtype(N)``, the same for each token of the text.
        text_maxima: ``[B, C, N]``, the similarity with that token, 0 where there is none or the own token is masked.
        image_maxima: ``[B, C, M]``.
    """
    dtype = compute_dtype(image_tokens)
    images, image_penalty = _unmasked(image_tokens.to(dtype), image_mask)
    texts, text_penalty = _unmasked(text_tokens.to(dtype), text_mask)
    (batch, image_count, _), (text_batch, text_count, _) = images.shape, texts.shape
    columns = texts.flatten(0, 1).t()

    parts: list[list[Tensor]] = [[], [], [], [], [], []]
    chunk = max(1, SIMILARITIES_AT_A_TIME // max(1, image_count * text_batch * text_count))
    for start in range(0, max(batch, 1), chunk):
        part = slice(start, start + chunk)
        rows = images[part].flatten(0, 1)
        products = rows @ columns if text_penalty is None else torch.addmm(text_penalty.reshape(-1), rows, columns)
        similarity = products.view(images[part].shape[0], image_count, text_batch, text_count)
        if image_penalty is not None:
            similarity = similarity + image_penalty[part, :, None, None]

        # torch.max gives the whole gradient to the first of equal maxima; torch.amax would divide it among them.
        text_maxima, best_text = similarity.max(dim=3)
        image_maxima, best_image = similarity.max(dim=1)
        if image_mask is not None:
            text_maxima = text_maxima.masked_fill(~image_mask[part, :, None], 0)
        if text_mask is not None:
            image_maxima = image_maxima.masked_fill(~text_mask, 0)
        found = [
            (image_normalized_weight[part, :, None] * text_maxima).sum(dim=1),
            (text_normalized_weight * image_maxima).sum(dim=2),
        ]
        if keep_best:
            found += [best_text.transpose(1, 2).to(index_dtype(text_count)), best_image.to(index_dtype(image_count))]
        if keep_maxima:
            found += [text_maxima.transpose(1, 2), image_maxima]
        for kept, one in zip([*parts[:2], *parts[2:4] * keep_best, *parts[4:] * keep_maxima], found, strict=True):
            kept.append(one)

    per_image, per_text = torch.cat(parts[0]), torch.cat(parts[1]).t().contiguous()
    nothing = image_normalized_weight.new_empty(0)
    maps = [torch.cat(part) for part in parts[2:4]] if keep_best else [nothing.to(torch.uint8), nothing.to(torch.uint8)]
    values = [torch.cat(part) for part in parts[4:]] if keep_maxima else [nothing, nothing.clone()]
    return per_image, per_text, *maps, *values  # type: ignore[return-value]


def token_maxima_backward(
    grad_mean: Tensor,
    grad_other_mean: Tensor,
    other_tokens: Tensor,
    mask: Tensor | None,
    other_mask: Tensor | None,
    normalized_weight: Tensor,
    other_normalized_weight: Tensor,
    best_other: Tensor,
    best: Tensor,
) -> Tensor:
    """Gradient of the tokens of one side, ``[B, N, D]`` in the dtype of ``other_tokens [C, M, D]``.

    A token gets its own winner, and the tokens that it has won::

        Σ_c  grad_mean[b, c] · normalized_weight[b, n] · other_tokens[c, best_other[b, c, n]]
           + grad_other_mean[c, b] · Σ_{m : best[b, c, m] = n} other_normalized_weight[c, m] · other_tokens[c, m]

    without terms in which either token is masked. For the images b, n, ``normalized_weight`` and ``best_other``
    are those of the image and ``best_text``; for the texts the two sides change places, maps transposed to
    ``[C, B, M]``, ``[C, B, N]``.
    """
    dtype = normalized_weight.dtype
    (batch, count), (other_batch, other_count, channels) = normalized_weight.shape, other_tokens.shape
    others, _ = _unmasked(other_tokens.to(dtype), other_mask)
    grad_tokens = other_tokens.new_empty(batch, count, channels)
    chunk = max(1, SIMILARITIES_AT_A_TIME // max(1, count * other_batch * other_count))
    for start in range(0, batch, chunk):
        part = slice(start, start + chunk)
        own = grad_mean[part, :, None] * normalized_weight[part, None]
        won = grad_other_mean.t()[part, :, None] * other_normalized_weight
        # Scattering along either axis meets no place twice, so nothing depends on an order.
        shape = (*own.shape, other_count)
        coefficient = own.new_zeros(shape).scatter_(3, best_other[part, ..., None].long(), own[..., None])
        coefficient += own.new_zeros(shape).scatter_(2, best[part, :, None].long(), won[:, :, None])
        if mask is not None:
            coefficient.masked_fill_(~mask[part, None, :, None], 0)
        if other_mask is not None:
            coefficient.masked_fill_(~other_mask[:, None], 0)
        grad_tokens[part] = coefficient.transpose(1, 2).flatten(2) @ others.flatten(0, 1)
    return grad_tokens


def _unmasked(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens with 0 where masked, and what to add to their similarities.

    Where a whole side is masked its zeroed tokens stay in the running: they win with similarity 0 and a zero gradient,
    which is what the empty maximum is defined to be.
    """
    if mask is None:
        return tokens, None
    absent = ~mask & mask.any(dim=1, keepdim=True)
    penalty = torch.zeros_like(absent, dtype=tokens.dtype).masked_fill(absent, -torch.inf)
    return tokens.masked_fill(~mask.unsqueeze(-1), 0), penalty


def affine(mean: Tensor, scale: float | Tensor, bias: float | Tensor | None) -> Tensor:
    """``scale · mean + bias``, in the dtype of the mean."""
    logits = mean * _scalar(scale, mean)
    return logits if bias is None else logits + _scalar(bias, mean)


def _scalar(value: float | Tensor, like: Tensor) -> float | Tensor:
    return value.to(like.dtype).reshape(()) if isinstance(value, Tensor) else value


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
    step = max(1, LOGITS_AT_A_TIME // max(1, columns))
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
