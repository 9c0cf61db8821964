"""The definition of right: transforms along the axes of a grid, given as matrices, with weights between them.

Tokens ``x [B, prefix + H · W, D]`` are points of a grid with channels; the token axis is a grid of one row.
``matrix_w`` transforms the rows, ``matrix_h`` the columns (None leaves columns as they are). For Fourier
transforms ``matrix_w`` stacks real over imaginary parts, ``[2 K, W]``, and ``matrix_h [2, H', H]`` is complex: real
part, imaginary part.

    separable   Y = A_h X A_wᵀ, for every channel
    analysis    Z = M_h (X R_wᵀ), complex
    synthesis   X = (M_h Z) S_wᵀ, where S_w [W', 2 K] takes real and imaginary parts to real tokens; with adjoint
                matrices this is the adjoint of an analysis
    filtered    an orthonormal analysis (or separable transform), a weight per coefficient and channel, the inverse

Tokens are widened to the dtype of the matrices, and the result is rounded once. Results with as many tokens copy the
prefix tokens; spectra leave them out.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def separable(
    x: Tensor, matrix_h: Tensor | None, matrix_w: Tensor, height: int, width: int, prefix_tokens: int
) -> Tensor:
    """``[B, prefix + H' · W', D]`` in the dtype of x for ``matrix_h [H', H]`` and ``matrix_w [W', W]``."""
    tokens = _separable(x[:, prefix_tokens:].to(matrix_w.dtype), matrix_h, matrix_w, height, width)
    return behind_prefix(x, tokens, prefix_tokens)


def analysis(
    x: Tensor, matrix_h: Tensor | None, matrix_w: Tensor, height: int, width: int, prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """Real and imaginary parts ``[B, H', K, D]`` in the dtype of x."""
    real, imaginary = _analysis(x[:, prefix_tokens:].to(matrix_w.dtype), matrix_h, matrix_w, height, width)
    return real.to(x.dtype), imaginary.to(x.dtype)


def synthesis(real: Tensor, imaginary: Tensor, matrix_h: Tensor | None, matrix_w: Tensor, prefix_tokens: int) -> Tensor:
    """``[B, prefix + H' · W', D]`` in the dtype of ``real [B, H, K, D]``; the prefix tokens are 0."""
    tokens = _synthesis(real.to(matrix_w.dtype), imaginary.to(matrix_w.dtype), matrix_h, matrix_w).to(real.dtype)
    return F.pad(tokens, (0, 0, prefix_tokens, 0)) if prefix_tokens else tokens.contiguous()


def filtered(
    x: Tensor, weight: Tensor, matrix_h: Tensor | None, matrix_w: Tensor, height: int, width: int, prefix_tokens: int
) -> Tensor:
    """Tokens filtered by ``weight``, ``[H, W, D]`` (cosine) or ``[H, K, D, 2]`` (Fourier), in the matrices' dtype."""
    tokens = _filtered(x[:, prefix_tokens:].to(matrix_w.dtype), weight, matrix_h, matrix_w, height, width)
    return behind_prefix(x, tokens, prefix_tokens)


def filtered_backward_weight(
    grad: Tensor,
    x: Tensor,
    matrix_h: Tensor | None,
    matrix_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
    fourier: bool,
) -> Tensor:
    """Gradient of the weight of `filtered`, in the dtype of the matrices, summed over the batch."""
    g, tokens = (t[:, prefix_tokens:].to(matrix_w.dtype) for t in (grad, x))
    if not fourier:
        spectra = [_separable(t, matrix_h, matrix_w, height, width) for t in (g, tokens)]
        return (spectra[0] * spectra[1]).sum(0).reshape(height, width, x.shape[2])
    g_real, g_imaginary = _analysis(g, matrix_h, matrix_w, height, width)
    x_real, x_imaginary = _analysis(tokens, matrix_h, matrix_w, height, width)
    count = multiplicity(width, matrix_w)[:, None]
    real = (g_real * x_real + g_imaginary * x_imaginary).sum(0) * count
    imaginary = (g_imaginary * x_real - g_real * x_imaginary).sum(0) * count
    return torch.stack((real, imaginary), -1)


def band_energy(
    x: Tensor,
    bands: Tensor,
    count: int,
    matrix_h: Tensor | None,
    matrix_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
    fourier: bool,
) -> Tensor:
    """``[B, count, D]``: the squared coefficients, mirror images included, of each band in ``bands`` (int32, flat)."""
    tokens = x[:, prefix_tokens:].to(matrix_w.dtype)
    power = _power(tokens, matrix_h, matrix_w, height, width, fourier)
    return product(band_members(bands, count, height, width, matrix_w, fourier), power).to(x.dtype)


def band_energy_backward(
    grad: Tensor,
    x: Tensor,
    bands: Tensor,
    matrix_h: Tensor | None,
    matrix_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
    fourier: bool,
) -> Tensor:
    """Gradient of x: twice the adjoint of the coefficients, each weighted by its band's gradient; 0 for the prefix."""
    tokens = x[:, prefix_tokens:].to(matrix_w.dtype)
    members = band_members(bands, grad.shape[1], height, width, matrix_w, fourier)
    weight = 2 * product(members.t(), grad.to(matrix_w.dtype))
    adjoint_w = matrix_w.t()
    if not fourier:
        adjoint_h = None if matrix_h is None else matrix_h.t()
        spectrum = _separable(tokens, matrix_h, matrix_w, height, width) * weight
        grad_x = _separable(spectrum, adjoint_h, adjoint_w, height, width)
    else:
        real, imaginary = _analysis(tokens, matrix_h, matrix_w, height, width)
        weight = weight.reshape(real.shape)
        grad_x = _synthesis(real * weight, imaginary * weight, adjoint(matrix_h), adjoint_w)
    return F.pad(grad_x, (0, 0, prefix_tokens, 0)).to(x.dtype)


def token_energy(
    x: Tensor,
    frequency_mask: Tensor,
    matrix_h: Tensor | None,
    matrix_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
) -> Tensor:
    """``[B, N]`` in the matrices' dtype: squares of the filtered tokens, summed over D; 0 for the prefix.

    ``frequency_mask`` is 1 for coefficients that pass and 0 for the others: ``[H, W]`` (cosine) or ``[H, K, 1]``
    (Fourier).
    """
    high = _high_pass(x[:, prefix_tokens:].to(matrix_w.dtype), frequency_mask, matrix_h, matrix_w, height, width)
    return F.pad(high.square().sum(-1), (prefix_tokens, 0))


def token_energy_backward(
    grad: Tensor,
    x: Tensor,
    frequency_mask: Tensor,
    matrix_h: Tensor | None,
    matrix_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
) -> Tensor:
    """Gradient of x: the coefficients that stay form a projection P, so it is ``2 P (g · P x)``; 0 for the prefix."""
    high = _high_pass(x[:, prefix_tokens:].to(matrix_w.dtype), frequency_mask, matrix_h, matrix_w, height, width)
    scaled = 2 * grad[:, prefix_tokens:, None].to(matrix_w.dtype) * high
    grad_x = _high_pass(scaled, frequency_mask, matrix_h, matrix_w, height, width)
    return F.pad(grad_x, (0, 0, prefix_tokens, 0)).to(x.dtype)


def adjoint(matrix_h: Tensor | None) -> Tensor | None:
    """The conjugate transpose of a complex matrix ``[2, H', H]``."""
    if matrix_h is None:
        return None
    real, imaginary = matrix_h
    return torch.stack((real.t(), -imaginary.t()))


def multiplicity(width: int, like: Tensor) -> Tensor:
    """``[K]``: how many coefficients each of half a spectrum stands for; DC and Nyquist are their own mirror image."""
    k = torch.arange(width // 2 + 1, device=like.device)
    return torch.where((k == 0) | (2 * k == width), 1.0, 2.0).to(like.dtype)


def behind_prefix(x: Tensor, tokens: Tensor, prefix_tokens: int) -> Tensor:
    """``tokens`` in the dtype of x behind its prefix tokens, contiguous."""
    tokens = tokens.to(x.dtype)
    return torch.cat((x[:, :prefix_tokens], tokens), 1) if prefix_tokens else tokens.contiguous()


def _separable(x: Tensor, matrix_h: Tensor | None, matrix_w: Tensor, height: int, width: int) -> Tensor:
    batch, _, channels = x.shape
    rows = product(matrix_w, x.reshape(batch * height, width, channels))
    if matrix_h is not None:
        rows = product(matrix_h, rows.reshape(batch, height, matrix_w.shape[0] * channels))
    return (
        rows.reshape(batch, -1, channels) if batch else rows.reshape(0, _points(matrix_h, matrix_w, height), channels)
    )


def _points(matrix_h: Tensor | None, matrix_w: Tensor, height: int) -> int:
    return matrix_w.shape[0] * (height if matrix_h is None else matrix_h.shape[0])


def _analysis(x: Tensor, matrix_h: Tensor | None, matrix_w: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    batch, _, channels = x.shape
    bins = matrix_w.shape[0] // 2
    if matrix_h is None:
        x = x.reshape(batch * height, width, channels)
        shape = (batch, height, bins, channels)
        return product(matrix_w[:bins], x).reshape(shape), product(matrix_w[bins:], x).reshape(shape)
    half = product(matrix_w, x.reshape(batch * height, width, channels)).reshape(batch, 2 * height, bins * channels)
    # Rows of `half` are real and imaginary part in turn, and so are the columns of these matrices.
    real, imaginary = matrix_h
    to_real = torch.stack((real, -imaginary), 2).flatten(1)
    to_imaginary = torch.stack((imaginary, real), 2).flatten(1)
    shape = (batch, matrix_h.shape[1], bins, channels)
    return product(to_real, half).reshape(shape), product(to_imaginary, half).reshape(shape)


def _synthesis(real: Tensor, imaginary: Tensor, matrix_h: Tensor | None, matrix_w: Tensor) -> Tensor:
    batch, height, bins, channels = real.shape
    if matrix_h is None:
        half = torch.cat((real, imaginary), 2)
    else:
        spectrum = torch.cat((real, imaginary), 1).reshape(batch, 2 * height, bins * channels)
        cosine, sine = matrix_h
        matrix = torch.stack((torch.cat((cosine, -sine), 1), torch.cat((sine, cosine), 1)), 1).flatten(0, 1)
        height = matrix_h.shape[1]
        half = product(matrix, spectrum)
    tokens = product(matrix_w, half.reshape(batch * height, 2 * bins, channels))
    return tokens.reshape(batch, height * matrix_w.shape[0], channels)


def _filtered(x: Tensor, weight: Tensor, matrix_h: Tensor | None, matrix_w: Tensor, height: int, width: int) -> Tensor:
    if weight.dim() == 3:
        spectrum = _separable(x, matrix_h, matrix_w, height, width) * weight.reshape(x.shape[1:])
        return _separable(spectrum, None if matrix_h is None else matrix_h.t(), matrix_w.t(), height, width)
    real, imaginary = _analysis(x, matrix_h, matrix_w, height, width)
    weight_real, weight_imaginary = weight.unbind(-1)
    return _back(
        real * weight_real - imaginary * weight_imaginary,
        real * weight_imaginary + imaginary * weight_real,
        matrix_h,
        matrix_w,
        width,
    )


def _back(real: Tensor, imaginary: Tensor, matrix_h: Tensor | None, matrix_w: Tensor, width: int) -> Tensor:
    """The inverse of an orthonormal analysis: its adjoint, mirror images counted."""
    count = multiplicity(width, matrix_w)
    return _synthesis(real, imaginary, adjoint(matrix_h), matrix_w.t() * torch.cat((count, count)))


def _high_pass(
    x: Tensor, frequency_mask: Tensor, matrix_h: Tensor | None, matrix_w: Tensor, height: int, width: int
) -> Tensor:
    if frequency_mask.dim() == 2:
        spectrum = _separable(x, matrix_h, matrix_w, height, width) * frequency_mask.reshape(-1, 1)
        return _separable(spectrum, None if matrix_h is None else matrix_h.t(), matrix_w.t(), height, width)
    real, imaginary = _analysis(x, matrix_h, matrix_w, height, width)
    return _back(real * frequency_mask, imaginary * frequency_mask, matrix_h, matrix_w, width)


def _power(x: Tensor, matrix_h: Tensor | None, matrix_w: Tensor, height: int, width: int, fourier: bool) -> Tensor:
    if not fourier:
        return _separable(x, matrix_h, matrix_w, height, width).square()
    real, imaginary = _analysis(x, matrix_h, matrix_w, height, width)
    return (real.square() + imaginary.square()).flatten(1, -2)


def band_members(bands: Tensor, count: int, height: int, width: int, like: Tensor, fourier: bool) -> Tensor:
    """``[count, coefficients]``: the multiplicity of each coefficient in its band's row, 0 in the others."""
    named = bands.reshape(1, -1) == torch.arange(count, device=bands.device)[:, None]
    weights = multiplicity(width, like).repeat(height) if fourier else like.new_ones(bands.numel())
    return torch.where(named, weights, 0.0)


class _Product(torch.autograd.Function):
    """``matrix @ x`` that autocast does not round to half precision, neither forward nor backward.

    A context around a plain matmul protects only the forward: ``torch.compile`` traces the backward under the autocast
    of its caller, and eager mode runs it under that of ``backward()``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, x: Tensor) -> Tensor:
        with _no_autocast(x.device):
            return torch.matmul(matrix, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (matrix,) = ctx.saved_tensors
        with _no_autocast(gradient.device):
            return None, torch.matmul(matrix.t(), gradient)


class _ProductWithTangents(_Product):
    """`_Product` with forward-mode differentiation; ``torch.compile`` refuses functions that define it."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        (matrix,) = ctx.saved_tensors
        with _no_autocast(tangent.device):
            return torch.matmul(matrix, tangent)


def product(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix @ x`` for a constant matrix ``[M, N]`` and ``x [B, N, D]``, in the dtype of both, autocast or not."""
    return (_Product if torch.compiler.is_dynamo_compiling() else _ProductWithTangents).apply(matrix, x)


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
