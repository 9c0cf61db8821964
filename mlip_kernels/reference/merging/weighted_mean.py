"""Size-weighted mean over tokens in plain PyTorch: what average pooling has to be once tokens have been merged."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tokens of ``dtype`` are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weighted_mean(x: Tensor, weight: Tensor | None = None, *, prefix_tokens: int = 0) -> Tensor:
    """``sum_n w_bn x_bn / sum_n w_bn`` over the tokens behind the prefix; differentiable in ``x`` and ``weight``."""
    return weighted_mean_and_total(x, weight, prefix_tokens)[0]


def weighted_mean_and_total(x: Tensor, weight: Tensor | None, prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """The mean ``[B, D]`` in the dtype of ``x`` and the total weight ``[B]`` in the accumulation dtype."""
    accumulate = accumulation_dtype(x.dtype)
    tokens = x[:, prefix_tokens:].to(accumulate)
    if weight is None:
        total = tokens.new_full((tokens.shape[0],), tokens.shape[1])
        weighted = tokens.sum(1)
    else:
        weight = weight[:, prefix_tokens:].to(accumulate)
        tokens = _without_unused(tokens, weight)
        total = weight.sum(1)
        weighted = (tokens * weight[:, :, None]).sum(1)
    empty = (total == 0)[:, None]
    mean = (weighted / total[:, None].masked_fill(empty, 1)).masked_fill(empty, 0)
    return mean.to(x.dtype).contiguous(), total


def weighted_mean_backward(
    grad: Tensor, weight: Tensor | None, total: Tensor, tokens: int, prefix_tokens: int
) -> Tensor:
    """``dx_bn = w_bn / W_b g_b``, 0 for prefix tokens and where the total weight ``W_b`` is 0."""
    batch, channels = grad.shape
    share = _share(weight, total, tokens, prefix_tokens)
    grad_x = grad.new_zeros(batch, tokens, channels)
    grad_x[:, prefix_tokens:] = share[:, :, None] * grad[:, None, :].to(total.dtype)
    return grad_x


def weighted_mean_backward_weight(grad: Tensor, x: Tensor, weight: Tensor, total: Tensor, prefix_tokens: int) -> Tensor:
    """``dw_bn = <g_b, x_bn - y_b> / W_b``, with ``<g_b, y_b> = sum_n w_bn <g_b, x_bn> / W_b``, so y is not needed."""
    share = _share(weight, total, x.shape[1], prefix_tokens)
    weight = weight[:, prefix_tokens:]
    tokens = _without_unused(x[:, prefix_tokens:].to(total.dtype), weight)
    products = (tokens * grad[:, None, :].to(total.dtype)).sum(2)
    centred = products - (share * products).sum(1, keepdim=True)
    empty = (total == 0)[:, None]
    grad_weight = total.new_zeros(x.shape[0], x.shape[1])
    grad_weight[:, prefix_tokens:] = (centred / total[:, None].masked_fill(empty, 1)).masked_fill(empty, 0)
    return grad_weight


def _share(weight: Tensor | None, total: Tensor, tokens: int, prefix_tokens: int) -> Tensor:
    """``w_bn / W_b`` of the tokens behind the prefix, 0 where the total is 0."""
    empty = (total == 0)[:, None]
    safe = total[:, None].masked_fill(empty, 1)
    counted = total.new_ones(1, tokens - prefix_tokens) if weight is None else weight[:, prefix_tokens:]
    return (counted / safe).masked_fill(empty, 0)


def _without_unused(tokens: Tensor, weight: Tensor) -> Tensor:
    """Tokens whose non-finite values count as 0 where the weight is 0: what padding holds must not matter."""
    return tokens.masked_fill((weight == 0)[:, :, None] & ~tokens.isfinite(), 0)
