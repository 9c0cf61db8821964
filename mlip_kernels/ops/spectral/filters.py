"""Spectral filter of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlip_kernels.ops.arguments import check_choice
from mlip_kernels.ops.spectral.checks import (
    argument_layout,
    check_filter_weight,
    check_given,
    check_grid_tokens,
    check_norm,
    spectrum_shape,
    written,
)
from mlip_kernels.ops.spectral.primitives import primitives
from mlip_kernels.reference import spectral as reference


def spectral_filter(
    x: Tensor,
    weight: Tensor,
    *,
    grid: Sequence[int] | None = None,
    basis: str = "rfft",
    norm: str | None = "ortho",
    prefix_tokens: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Transform tokens, multiply each coefficient of each channel by a weight, transform back.

    With the basis ``"rfft"`` this is the global filter layer of GFNet: ``irfft2(weight · rfft2(x))`` over the grid, or
    ``irfft(weight · rfft(x))`` over the token axis. A weight that no real kernel has means what CPU
    ``torch.fft.irfft2`` makes of it, on every device: the DC and (even width) Nyquist columns act as
    ``(W[k] + conj W[-k]) / 2``, where -k mirrors the row, in the result and in the gradient of the weight. With
    ``"dct"`` it is ``idct(weight · dct(x))``, type 2.

    Args:
        x: tokens ``[B, N, D]``; float32, bfloat16, float16 or float64. B may be 0.
        weight: real and imaginary parts ``[H, W // 2 + 1, D, 2]`` with a grid or ``[n // 2 + 1, D, 2]`` on the token
            axis (``n = N - prefix_tokens``) for ``"rfft"``; ``[H, W, D]`` or ``[n, D]`` for ``"dct"``. Any of the
            dtypes of x; on the device of x.
        grid: ``(H, W)`` with ``H · W = n``, or ``None`` for the token axis.
        basis: ``"rfft"`` or ``"dct"``.
        norm: ``"ortho"``, ``"backward"`` (or ``None``) or ``"forward"``, applied both ways; the factors cancel, so it
            has no effect on the result beyond rounding.
        prefix_tokens: leading class or register tokens, which are copied through.
        out: a tensor with the shape, dtype and device of x that receives the result and is returned, as in torch. It
            may have any strides and share memory with x or the weight. On CPUs nothing of its size is allocated where
            it is contiguous, shares no memory with them, and no weight in float64 widens x; in all other cases the
            result is computed and copied.

    Returns:
        ``[B, N, D]`` in the dtype of x, computed in float32 (float64 if x or the weight is) and rounded once. A weight
        of zeros gives zeros; an infinite or NaN token makes its channel NaN.

    Saved for backward: the weight where x needs a gradient, x where the weight does; the spectrum is computed again.
    Long axes and the range of values are described in `mlip_kernels.ops.spectral`.
    The operator is linear in either: it can be differentiated any number of times.

    Raises:
        TypeError, ValueError: naming the argument.
        RuntimeError: ``out`` is given and autograd would record the call.

    Source: Rao et al., "Global Filter Networks for Image Classification", NeurIPS 2021, equations 3 to 5.
    """
    x, grid, prefix_tokens = check_grid_tokens(x, grid, prefix_tokens)
    check_choice("basis", basis, ("rfft", "dct"))
    pair, channels = ([2], ", D, 2") if basis == "rfft" else ([], ", D")
    shape = [*spectrum_shape(x.shape[1] - prefix_tokens, grid, basis), x.shape[2], *pair]
    weight = check_filter_weight(weight, x, shape, argument_layout(grid, basis, channels))
    check_norm(norm)
    given = check_given(out, x.shape, "[B, N, D]", x, weight)
    if weight.dtype == torch.float64 != x.dtype:  # computed in another dtype than that of the result
        result = reference.spectral_filter(x, weight, grid, basis, prefix_tokens, primitives())
    else:
        result = reference.spectral_filter(x, weight, grid, basis, prefix_tokens, primitives(*given))
    return result if out is None else written(result, out)
