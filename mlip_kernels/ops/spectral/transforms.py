"""DCT, real FFT and spectral resizing of tokens. Long axes and the range of values: see `mlip_kernels.ops.spectral`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mlip_kernels.ops.arguments import check_flag, check_new_grid
from mlip_kernels.ops.spectral.checks import (
    check_axis,
    check_dct_type,
    check_given,
    check_given_pair,
    check_grid_tokens,
    check_norm,
    check_spectrum,
    spectrum_shape,
    written,
)
from mlip_kernels.ops.spectral.primitives import primitives
from mlip_kernels.reference import spectral as reference
from mlip_kernels.reference.spectral.long_axes import is_long


def dct(
    x: Tensor,
    *,
    type: int = 2,
    dim: int = 1,
    grid: Sequence[int] | None = None,
    norm: str | None = "ortho",
    prefix_tokens: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Discrete cosine transform of tokens, with the types and norms of ``scipy.fft``.

    Equals ``scipy.fft.dct(x, type, axis=dim, norm=norm)`` without a grid and ``scipy.fft.dctn`` over the axes H and W
    with one.

    Args:
        x: tokens ``[B, N, D]``; float32, bfloat16, float16 or float64. B may be 0.
        type: 1, 2, 3 or 4.
        dim: 1 transforms over the tokens, 2 over the channels (-2 and -1 count from the end).
        grid: ``(H, W)`` with ``H · W = N - prefix_tokens`` transforms over both axes of the patch grid; ``None`` over
            the one axis ``dim``.
        norm: ``"ortho"`` (orthonormal: scipy's ``orthogonalize=True``), ``"backward"`` (the transform is not scaled)
            or ``"forward"`` (it is divided by 2n, for type 1 by 2(n - 1), per axis); ``None`` means ``"backward"``.
        prefix_tokens: leading class or register tokens, which are copied through.
        out: a tensor with the shape, dtype and device of x that receives the result and is returned, as in torch. It
            may have any strides and share memory with x. On CPUs nothing of its size is allocated where it is
            contiguous, shares no memory with x, and ``dim`` is 1; in all other cases the result is computed and copied.

    Returns:
        ``[B, N, D]`` in the dtype of x; on a grid, token ``prefix_tokens + k_h · W + k_w`` is coefficient
        ``(k_h, k_w)``. Half precision is computed in float32 and rounded once, so a float16 coefficient beyond 65504
        is infinite. An infinite or NaN token makes the whole spectrum of its channel NaN or infinite. How
        large tokens may be, and what happens on axes of more than 1,024 points: see `mlip_kernels.ops.spectral`.

    Nothing is saved for backward. The operator is linear: it can be differentiated any number of times.

    Raises:
        TypeError, ValueError: naming the argument. Type 1 needs two points along each axis.
        RuntimeError: ``out`` is given and autograd would record the call.

    Source: Ahmed, Natarajan and Rao, "Discrete Cosine Transform", IEEE Transactions on Computers, 1974.
    """
    x, grid, prefix_tokens = check_grid_tokens(x, grid, prefix_tokens)
    dim = check_axis(dim, grid)
    type = check_dct_type(type, _lengths(x, dim, grid, prefix_tokens))
    given = check_given(out, x.shape, "[B, N, D]", x)
    result = reference.dct(x, type, dim, grid, check_norm(norm), prefix_tokens, primitives(*given))
    return result if out is None else written(result, out)


def idct(
    x: Tensor,
    *,
    type: int = 2,
    dim: int = 1,
    grid: Sequence[int] | None = None,
    norm: str | None = "ortho",
    prefix_tokens: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Inverse of `dct` with the same arguments: ``idct(dct(x, ...), ...)`` is x, for each type and norm.

    Equals ``scipy.fft.idct`` or, with a grid, ``scipy.fft.idctn``; with ``norm="backward"`` it divides by 2n (type 1:
    by 2(n - 1)) per axis, with ``"forward"`` it does not scale. Arguments, result, what is saved for backward and
    errors are as in `dct`.
    """
    x, grid, prefix_tokens = check_grid_tokens(x, grid, prefix_tokens)
    dim = check_axis(dim, grid)
    type = check_dct_type(type, _lengths(x, dim, grid, prefix_tokens))
    given = check_given(out, x.shape, "[B, N, D]", x)
    result = reference.idct(x, type, dim, grid, check_norm(norm), prefix_tokens, primitives(*given))
    return result if out is None else written(result, out)


def rfft(
    x: Tensor,
    *,
    grid: Sequence[int] | None = None,
    norm: str | None = "ortho",
    prefix_tokens: int = 0,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Fourier transform of real tokens as two real tensors: no complex tensor appears.

    Equals ``torch.fft.rfft(x, dim=1)`` without a grid and ``torch.fft.rfft2(x.view(B, H, W, D), dim=(1, 2))`` with one.

    Args:
        x: tokens ``[B, N, D]``; float32, bfloat16, float16 or float64. B may be 0.
        grid: ``(H, W)`` with ``H · W = N - prefix_tokens``, or ``None`` for the token axis.
        norm: ``"ortho"`` (divide by the square root of the number of points), ``"backward"`` (do not scale; ``None``
            means the same) or ``"forward"`` (divide by the number of points).
        prefix_tokens: leading class or register tokens, which are left out of the spectrum.
        out: two tensors ``(real, imag)`` that receive the result and are returned, as `dct` describes.

    Returns:
        ``(real, imag)`` in the dtype of x, each ``[B, n // 2 + 1, D]`` with ``n = N - prefix_tokens``, or
        ``[B, H, W // 2 + 1, D]`` with H in FFT order. The imaginary part of DC and Nyquist is exactly 0 on the token
        axis. Half precision is computed in float32 and rounded once.

    Nothing is saved for backward. The operator is linear: it can be differentiated any number of times.

    Raises:
        TypeError, ValueError: naming the argument.
        RuntimeError: ``out`` is given and autograd would record the call.

    Source: Cooley and Tukey, Mathematics of Computation 19, 1965, for the transform; definition of ``torch.fft``.
    """
    x, grid, prefix_tokens = check_grid_tokens(x, grid, prefix_tokens)
    norm = check_norm(norm)
    if out is None:
        return reference.rfft(x, grid, norm, prefix_tokens, primitives())
    length = x.shape[1] - prefix_tokens
    shape = [x.shape[0], *spectrum_shape(length, grid, "rfft"), x.shape[2]]
    parts = check_given_pair(out, shape, "[B, H, W // 2 + 1, D]" if grid else "[B, n // 2 + 1, D]", x)
    if is_long(*(grid or (1, length))):
        result = reference.rfft(x, grid, norm, prefix_tokens)
        return parts[0].copy_(result[0]), parts[1].copy_(result[1])
    reference.rfft(x, grid, norm, prefix_tokens, primitives(*(part if grid else part.unsqueeze(1) for part in parts)))
    return parts


def irfft(
    real: Tensor,
    imag: Tensor,
    *,
    n: int | None = None,
    grid: Sequence[int] | None = None,
    norm: str | None = "ortho",
    out: Tensor | None = None,
) -> Tensor:
    """Real tokens from half a spectrum: the inverse of `rfft`.

    Equals ``torch.fft.irfft(torch.complex(real, imag), n, dim=1)`` or, on a grid, CPU ``torch.fft.irfft2`` with
    ``s=(H, W), dim=(1, 2)``, on every device: for a spectrum that no real signal has, the inverse over H comes first,
    and the imaginary part of the DC and (W even) Nyquist columns is then ignored.

    Args:
        real: ``[B, n // 2 + 1, D]``, or ``[B, H, W // 2 + 1, D]`` with a grid; float32, bfloat16, float16 or float64.
        imag: the same shape, dtype and device.
        n: the number of tokens; ``None`` means ``2 (K - 1)`` for K coefficients, as in ``torch.fft``, which is wrong
            for an odd number of tokens. Not given together with a grid.
        grid: ``(H, W)``, or ``None`` for the token axis.
        norm: the norm that `rfft` was called with.
        out: a tensor of the shape of the result and the dtype and device of ``real`` that receives the result and is
            returned, as `dct` describes.

    Returns:
        ``[B, n, D]`` or ``[B, H · W, D]`` in the dtype of ``real``. Half precision is computed in float32 and rounded
        once.

    Nothing is saved for backward. The operator is linear: it can be differentiated any number of times.

    Raises:
        TypeError, ValueError: naming the argument. A spectrum is never cropped or padded to fit n.
        RuntimeError: ``out`` is given and autograd would record the call.
    """
    real, imag, n, grid = check_spectrum(real, imag, n, grid)
    shape = [real.shape[0], n, real.shape[-1]]
    given = check_given(out, shape, "[B, H · W, D]" if grid else "[B, n, D]", real, imag)
    result = reference.irfft(real, imag, n, grid, check_norm(norm), primitives(*given))
    return result if out is None else written(result, out)


def spectral_resize(
    x: Tensor,
    grid: Sequence[int],
    new_grid: Sequence[int],
    *,
    rescale: bool = True,
    prefix_tokens: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Resize the patch grid in the frequency domain.

    The orthonormal DCT (type 2) over the grid is cropped or zero-padded to the lowest ``h x w`` frequencies and
    transformed back on the new grid: ``A_h X A_wᵀ`` per channel, with one ``h x H`` and one ``w x W`` matrix.

    Args:
        x: tokens ``[B, N, D]``; float32, bfloat16, float16 or float64. B may be 0.
        grid: ``(H, W)`` with ``H · W = N - prefix_tokens``.
        new_grid: ``(h, w)``; each axis may grow or shrink.
        rescale: multiply by ``sqrt(h·w / (H·W))``, which keeps constants constant; without it the energy is kept
            where nothing is cropped.
        prefix_tokens: leading class or register tokens, which are copied through.
        out: a tensor of the shape of the result and the dtype and device of x that receives the result and is returned,
            as `dct` describes.

    Returns:
        ``[B, prefix_tokens + h · w, D]`` in the dtype of x. Half precision is computed in float32 and rounded once.

    Nothing is saved for backward. The operator is linear: it can be differentiated any number of times.

    Raises:
        TypeError, ValueError: naming the argument.
        RuntimeError: ``out`` is given and autograd would record the call.
    """
    old, new = check_new_grid("grid", grid), check_new_grid("new_grid", new_grid)
    x, _, prefix_tokens = check_grid_tokens(x, old, prefix_tokens)
    rescale = check_flag("rescale", rescale)
    shape = [x.shape[0], prefix_tokens + new[0] * new[1], x.shape[2]]
    given = check_given(out, shape, "[B, prefix_tokens + h · w, D]", x)
    result = reference.spectral_resize(x, old, new, rescale, prefix_tokens, primitives(*given))
    return result if out is None else written(result, out)


def _lengths(x: Tensor, dim: int, grid: tuple[int, int] | None, prefix_tokens: int) -> tuple[int, ...]:
    if grid is not None:
        return grid
    return (x.shape[1] - prefix_tokens,) if dim == 1 else (x.shape[2],)
