"""Proportional attention: a merged token attracts as much attention as the tokens it stands for."""

from __future__ import annotations

from torch import Tensor

from mlip_kernels.ops.arguments import (
    check_flag,
    check_number,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    values_known,
)
from mlip_kernels.ops.merging.plan import check_size
from mlip_kernels.reference import merging as reference


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
    return reference.proportional_attention(q, k, v, size, scale=scale, dropout_p=dropout_p, padding=padding)
