"""Attention in which a token counts for the tokens merged into it, on torch's fused attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def proportional_attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, *, scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """``softmax(q kᵀ · scale + log size) v``; see `mlip_kernels.proportional_attention`."""
    device = q.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return _attend(q, k, v, size, scale, dropout_p)
    # Autocast rounds q, k and v to its dtype, but would round log size as well.
    if q.dtype != torch.float64:
        q, k, v = (t.to(torch.get_autocast_dtype(device)) for t in (q, k, v))
    with torch.autocast(device, enabled=False):
        return _attend(q, k, v, size, scale, dropout_p)


def _attend(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float | None, dropout_p: float) -> Tensor:
    if size is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout_p)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    bias = size.to(exact).log()[:, None, None, :]
    empty = (bias == -torch.inf).all(dim=-1, keepdim=True)
    # Backends differ in what they make of a row without any key: it gets finite scores, then zeros.
    bias = bias.masked_fill(empty, 0)
    if q.device.type != "cpu" or dropout_p > 0:
        # Only the fused attention of the CPU adds a float32 bias to scores of half precision.
        bias = bias.to(q.dtype)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, dropout_p=dropout_p)
    return attended.masked_fill(empty, 0)
