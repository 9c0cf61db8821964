"""Proportional attention: a merged token attracts as much attention as the tokens it stands for.

There are two ways to hand log size to a fused kernel. As a mask it is added to the scores, in float32 on the CPU, and
in float32 on GPUs where the scores come from float32. Kernels for half precision on GPUs take a mask only in half
precision, which rounds it, and the fastest of them (flash attention) take none. There log size becomes a part of the
product of queries and keys, in channels of its own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_kernels._arguments import (
    autocast_enabled,
    check_flag,
    check_number,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    values_known,
)
from mlip_kernels.merging.merge import check_size

WIDEST_FLASH = 256
"""Channels of a head that flash attention takes at most; it takes multiples of 8."""


def proportional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    padding: bool = True,
) -> Tensor:
    """Scaled dot-product attention whose keys count as often as their ``size``: ``softmax(q kᵀ · scale + log size) v``.

    It equals attention over the unmerged sequence in which every key is repeated ``size`` times (Bolya et al.,
    "Token Merging: Your ViT But Faster", ICLR 2023, eq. 1), and runs on torch's fused `scaled_dot_product_attention`.

    Args:
        q: queries ``[B, H, M, d]``.
        k: keys ``[B, H, N, d]``.
        v: values ``[B, H, N, e]``; q, k and v share one dtype, unless autocast gives them one.
        size: ``[B, N]``, how many tokens every key stands for, in any floating or integer dtype; it is a count and
            takes no gradient. A key of size 0 (padding) is not attended to; its k and v must still be finite.
            ``None`` means ones.
        scale: factor of the scores, ``1 / sqrt(d)`` if None.
        dropout_p: probability of dropping an attention weight; applied whenever it is above 0.
        padding: whether sizes of 0 may occur. False promises that every sample has a key of a size above 0, and saves
            a pass over the output (two with the backward pass) that is there for samples which have none. On the CPU
            the sizes themselves say whether it is needed, unless the call is traced.

    Returns:
        ``[B, H, M, e]`` in the dtype of q, or in that of autocast where it is on. A sample whose sizes are all 0 gives
        zeros and no gradient; with ``padding=False``, anything.

    ``log size`` is taken in float32, so counts beyond the range of float16 are exact, also under autocast. On the CPU
    it stays in float32 (float64 for float64 inputs) up to the softmax, and so it does on GPUs for float32 inputs. For
    half precision on GPUs it becomes two channels of q and k, which hold it to 2⁻¹⁶ of its value: that way flash
    attention can run, which takes no mask. d grows to the next multiple of 8 above d + 1 there (64 to 72), up to the
    256 of flash attention. Other devices, and dropout on the CPU, take log size in the dtype of q, which rounds it: in
    bfloat16 by at most 0.4 % of its value.

    Saved for backward: what fused attention saves (q, k, v, the output, one logsumexp per query) and the bias, 4·B·N
    bytes; for half precision on GPUs copies of q, k and v with the wider d take their place.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range, or ``size`` requires a
            gradient.
    """
    check_tensor("q", q, layout="[B, H, M, d]")
    check_tensor("k", k, layout="[B, H, N, d]")
    check_tensor("v", v, layout="[B, H, N, e]")
    batch, heads, _, width = q.shape
    check_shape("k", k, (batch, heads, k.shape[2], width), "[B, H, N, d]")
    check_shape("v", v, (batch, heads, k.shape[2], v.shape[3]), "[B, H, N, e]")
    for name, value in (("k", k), ("v", v)):
        check_same_device(name, value, "q", q)
        check_same_dtype(name, value, "q", q)
    if size is not None:
        check_size(size, (batch, k.shape[2]), "k", k)
    if scale is not None:
        scale = check_number("scale", scale)
    dropout_p = check_number("dropout_p", dropout_p, minimum=0.0, maximum=1.0)
    padding = check_flag("padding", padding)
    if padding and size is not None and size.device.type == "cpu" and values_known(size):
        padding = bool((size == 0).all(dim=1).any())
    device = q.device.type
    if not autocast_enabled(device):
        return _attend(q, k, v, size, scale, dropout_p, padding)
    # Autocast rounds q, k and v to its dtype, but would round log size as well.
    if q.dtype != torch.float64:
        q, k, v = (t.to(torch.get_autocast_dtype(device)) for t in (q, k, v))
    with torch.autocast(device, enabled=False):
        return _attend(q, k, v, size, scale, dropout_p, padding)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float | None, dropout_p: float, padding: bool
) -> Tensor:
    if size is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout_p)
    log_size = size.to(torch.float64 if q.dtype == torch.float64 else torch.float32).log()
    empty = None
    if padding:
        # Backends differ in what they make of a row without any key: it gets finite scores, then zeros.
        empty = (log_size == -torch.inf).all(dim=-1, keepdim=True)
        log_size = log_size.masked_fill(empty, 0)
        empty = empty[:, None, None]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    width = channels_with_size(q.shape[-1], v.shape[-1])
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and scale > 0 and width <= WIDEST_FLASH:
        attended = attend_by_channels(q, k, v, log_size, scale=scale, dropout_p=dropout_p)
    else:
        # Only the fused attention of the CPU adds a float32 bias to scores of half precision, and it drops nothing.
        bias = log_size if q.device.type == "cpu" and dropout_p == 0 else log_size.to(q.dtype)
        bias = bias[:, None, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, dropout_p=dropout_p)
    # `where` keeps the strides of attention, which differ from those of a contiguous tensor; masked_fill does not.
    return attended if empty is None else torch.where(empty, 0, attended)


def channels_with_size(width: int, value_width: int) -> int:
    """Channels of a head that holds log size as well: two more, then up to a multiple of 8, at least those of v."""
    return -(-max(width + 2, value_width) // 8) * 8


def attend_by_channels(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor, *, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """``softmax(q kᵀ · scale + log_size) v`` without a mask, for ``log_size [B, N]`` below the scale of its scores.

    Queries get a channel of a power of two, keys the rest of the product: log size rounded to the dtype of k, and in
    another channel what the rounding left. Both together err by 2⁻¹⁶ of log size in bfloat16 and by 2⁻²² in float16,
    less than the scores themselves. Where log size is −inf, keys get the lowest score that has no overflow.
    """
    width, value_width = q.shape[-1], v.shape[-1]
    total = channels_with_size(width, value_width)
    factor = 2.0 ** round(-math.log2(scale))
    product = log_size / (scale * factor)
    product = product.clamp(min=max(torch.finfo(k.dtype).min / 2, -1e30))
    rounded = product.to(k.dtype)
    rest = (product - rounded.to(product.dtype)).to(k.dtype)
    query_channels = q.new_zeros(total - width)
    query_channels[:2].fill_(factor)
    key_channels = F.pad(torch.stack((rounded, rest), dim=-1), (0, total - width - 2))[:, None]
    queries = torch.cat((q, query_channels.expand(*q.shape[:3], -1)), dim=-1)
    keys = torch.cat((k, key_channels.expand(*k.shape[:3], -1)), dim=-1)
    values = F.pad(v, (0, total - value_width))
    attended = F.scaled_dot_product_attention(queries, keys, values, scale=scale, dropout_p=dropout_p)
    return attended[..., :value_width]
