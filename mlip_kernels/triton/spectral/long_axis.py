"""Maps of a long token axis, and of grids too large for a tile: one axis after another, the spectrum kept in memory.

    out[b, o, m, i] = sum_k A[m, k] x[b, o, k, i]     A [M, K] float32, i over the INNER elements behind the axis

    reads    M / BLOCK_M times x, A once for each BLOCK_I of the inner elements: all but the first from the L2 cache
    writes   out
    flops    2 M K for each line, six times that many on the tensor cores, three times where it need not be exact

A program owns BLOCK_M x BLOCK_I elements of the product for one b and o, and sums over K in chunks, so that rounding
towards zero in the tensor cores does not add up. With a hundred points and more, the dense matrix is bound by the
tensor cores: a spectrum that passes through memory costs less than one that does not fit the registers. What lies
between transforms is done by PyTorch, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlip_kernels.spectral.plain import adjoint, multiplicity
from mlip_kernels.triton.spectral.products import multiply

BLOCK_M = 64
BLOCK_I = 64
BLOCK_K = 16


@triton.jit(do_not_specialize=("M", "K", "OUTER"))
def spectral_axis_kernel(
    x,  # [B, OUTER, K, INNER], unit stride in INNER
    matrix,  # float32 [M, K]
    out,  # [B, OUTER, M, INNER], unit stride in INNER
    M,
    K,
    INNER,
    OUTER,
    matrix_row,
    matrix_column,
    x_batch,
    x_outer,
    x_point,
    out_batch,
    out_outer,
    out_point,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    inner_blocks = tl.cdiv(INNER, BLOCK_I)
    line = (tl.program_id(0) // inner_blocks).to(tl.int64)
    i = tl.program_id(0) % inner_blocks * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    b, o = line // OUTER, line % OUTER
    points = x + b * x_batch + o * x_outer + i
    none = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    total = none
    for first in range(0, K, BLOCK_K):
        row = (first + tl.arange(0, BLOCK_K))[:, None]
        data = tl.load(points + row.to(tl.int64) * x_point, mask=(row < K) & (i < INNER), other=0.0).to(tl.float32)
        column = (first + tl.arange(0, BLOCK_K))[None, :]
        at = m * matrix_row + column * matrix_column
        part = tl.load(matrix + at, mask=(m < M) & (column < K), other=0.0)
        total += multiply(part, data, none, EXACT)
    to = out + b * out_batch + o * out_outer + m.to(tl.int64) * out_point + i
    tl.store(to, total.to(out.dtype.element_ty), mask=(m < M) & (i < INNER))


def _along(x: Tensor, matrix: Tensor, out: Tensor, exact: bool) -> Tensor:
    """``out[b, o] = matrix @ x[b, o]``: [B, OUTER, K, INNER] to [B, OUTER, M, INNER], unit stride in INNER."""
    batch, outer, points, inner = x.shape
    if out.numel() == 0:
        return out
    grid = (batch * outer * triton.cdiv(inner, BLOCK_I), triton.cdiv(matrix.shape[0], BLOCK_M))
    spectral_axis_kernel[grid](
        x,
        matrix,
        out,
        matrix.shape[0],
        points,
        inner,
        outer,
        *matrix.stride(),
        *x.stride()[:3],
        *out.stride()[:3],
        EXACT=exact,
        BLOCK_M=BLOCK_M,
        BLOCK_I=BLOCK_I,
        BLOCK_K=BLOCK_K,
        num_warps=4,
        maxnreg=255,
    )
    return out


def _exact(dtype: torch.dtype) -> bool:
    return dtype != torch.bfloat16


def _grid_of(x: Tensor, height: int, width: int, prefix_tokens: int) -> Tensor:
    """Tokens behind the prefix as a view ``[B, H, W, D]``."""
    tokens = x[:, prefix_tokens:]
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    return tokens.unflatten(1, (height, width))


def _stacked(along_h: Tensor) -> Tensor:
    """A complex matrix ``[2, R, H]`` as a real one, ``[2 R, 2 H]``, on real parts over imaginary parts."""
    real, imaginary = along_h
    return torch.cat((torch.cat((real, -imaginary), 1), torch.cat((imaginary, real), 1)))


def _separable(tokens: Tensor, along_h: Tensor | None, along_w: Tensor, out: Tensor, exact: bool) -> None:
    """``[B, H, W, D]`` to ``out [B, H', W', D]``, whose rows follow one another."""
    batch, height, _, channels = tokens.shape
    if along_h is None:
        _along(tokens, along_w, out, exact)
        return
    half = along_w.new_empty(batch, height, along_w.shape[0], channels)
    _along(tokens, along_w, half, exact)
    _along(half.flatten(2).unsqueeze(1), along_h, out.flatten(2).unsqueeze(1), exact)


def _analysis(
    tokens: Tensor, along_h: Tensor | None, along_w: Tensor, exact: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Real and imaginary part ``[B, R, K, D]`` of ``[B, H, W, D]``."""
    batch, height, _, channels = tokens.shape
    kept = along_w.shape[0] // 2
    rows = height if along_h is None else along_h.shape[1]
    parts = along_w.new_empty(2, batch, rows, kept, channels, dtype=dtype)
    half = parts.transpose(0, 1) if along_h is None else along_w.new_empty(batch, 2, height, kept, channels)
    for part in range(2):
        _along(tokens, along_w[part * kept : (part + 1) * kept], half[:, part], exact)
    if along_h is not None:
        half, matrix = half.reshape(batch, 1, 2 * height, kept * channels), _stacked(along_h)
        for part in range(2):
            _along(half, matrix[part * rows : (part + 1) * rows], parts[part].flatten(2).unsqueeze(1), exact)
    return parts[0], parts[1]


def _synthesis(
    real: Tensor, imaginary: Tensor, along_h: Tensor | None, along_w: Tensor, out: Tensor, exact: bool
) -> None:
    """``[B, R, K, D]`` twice to ``out [B, H', W', D]``."""
    batch, rows, kept, channels = real.shape
    if along_h is None:
        lines = torch.cat((real, imaginary), 2)
    else:
        spectrum = torch.cat((real, imaginary), 1).reshape(batch, 1, 2 * rows, kept * channels)
        matrix, height = _stacked(along_h), along_h.shape[1]
        lines = along_w.new_empty(batch, height, 2, kept, channels)
        for part in range(2):
            to = lines[:, :, part].flatten(2).unsqueeze(1)
            _along(spectrum, matrix[part * height : (part + 1) * height], to, exact)
        lines = lines.flatten(2, 3)
    _along(lines, along_w, out, exact)


def separable(
    x: Tensor, along_h: Tensor | None, along_w: Tensor, height: int, width: int, prefix_tokens: int
) -> Tensor:
    """See ``separable.separable``."""
    rows, columns = height if along_h is None else along_h.shape[0], along_w.shape[0]
    out = x.new_empty(x.shape[0], prefix_tokens + rows * columns, x.shape[2])
    out[:, :prefix_tokens] = x[:, :prefix_tokens]
    to = _grid_of(out, rows, columns, prefix_tokens)
    _separable(_grid_of(x, height, width, prefix_tokens), along_h, along_w, to, _exact(x.dtype))
    return out


def analysis(
    x: Tensor, along_h: Tensor | None, along_w: Tensor, height: int, width: int, prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """See ``analysis.analysis``."""
    return _analysis(_grid_of(x, height, width, prefix_tokens), along_h, along_w, _exact(x.dtype), x.dtype)


def synthesis(real: Tensor, imaginary: Tensor, along_h: Tensor | None, along_w: Tensor, prefix_tokens: int) -> Tensor:
    """See ``synthesis.synthesis``."""
    height = real.shape[1] if along_h is None else along_h.shape[1]
    out = real.new_empty(real.shape[0], prefix_tokens + height * along_w.shape[0], real.shape[3])
    out[:, :prefix_tokens] = 0
    to = _grid_of(out, height, along_w.shape[0], prefix_tokens)
    _synthesis(real, imaginary, along_h, along_w, to, _exact(real.dtype))
    return out


class _Spectrum:
    """An orthonormal map there and back: cosine or, with ``fourier``, half a spectrum."""

    def __init__(self, along_h: Tensor | None, along_w: Tensor, width: int, fourier: bool, exact: bool) -> None:
        self.along_h, self.along_w, self.fourier, self.exact = along_h, along_w, fourier, exact
        self.count = multiplicity(width, along_w)[:, None] if fourier else None

    def of(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The coefficients of ``[B, H, W, D]``: float32 ``[B, H, K, D]``, real and imaginary part if Fourier."""
        if self.fourier:
            return _analysis(tokens, self.along_h, self.along_w, self.exact, torch.float32)
        out = self.along_w.new_empty(tokens.shape)
        _separable(tokens, self.along_h, self.along_w, out, self.exact)
        return (out,)

    def back(self, parts: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """The tokens of a spectrum, mirror images counted, into ``out``."""
        if self.fourier:
            parts = tuple(part * self.count for part in parts)
            _synthesis(*parts, adjoint(self.along_h), self.along_w.t(), out, self.exact)
        else:
            _separable(*parts, None if self.along_h is None else self.along_h.t(), self.along_w.t(), out, self.exact)
        return out


def filtered(
    x: Tensor, weight: Tensor, along_h: Tensor | None, along_w: Tensor, height: int, width: int, prefix_tokens: int
) -> Tensor:
    """See ``filtered.filtered``."""
    spectrum = _Spectrum(along_h, along_w, width, weight.dim() == 4, _exact(x.dtype))
    parts = spectrum.of(_grid_of(x, height, width, prefix_tokens))
    if spectrum.fourier:
        real, imaginary = parts
        weight_real, weight_imaginary = weight.unbind(-1)
        parts = (
            real * weight_real - imaginary * weight_imaginary,
            real * weight_imaginary + imaginary * weight_real,
        )
    else:
        parts = (parts[0] * weight,)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[:, :prefix_tokens] = x[:, :prefix_tokens]
    spectrum.back(parts, _grid_of(out, height, width, prefix_tokens))
    return out


def filtered_backward_weight(
    grad: Tensor,
    x: Tensor,
    along_h: Tensor | None,
    along_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
    fourier: bool,
) -> Tensor:
    """See ``filtered_backward_weight.filtered_backward_weight``."""
    spectrum = _Spectrum(along_h, along_w, width, fourier, True)
    g, tokens = (spectrum.of(_grid_of(t, height, width, prefix_tokens)) for t in (grad, x))
    if not fourier:
        return (g[0] * tokens[0]).sum(0)
    real = (g[0] * tokens[0] + g[1] * tokens[1]).sum(0)
    imaginary = (g[1] * tokens[0] - g[0] * tokens[1]).sum(0)
    return torch.stack((real, imaginary), -1) * spectrum.count[..., None]


def band_energy(
    x: Tensor,
    bands: Tensor,
    count: int,
    along_h: Tensor | None,
    along_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
    fourier: bool,
) -> Tensor:
    """See ``band_energy.band_energy``."""
    spectrum = _Spectrum(along_h, along_w, width, fourier, _exact(x.dtype))
    power = sum(part.square() for part in spectrum.of(_grid_of(x, height, width, prefix_tokens)))
    if fourier:
        power = power * spectrum.count
    members = (bands == torch.arange(count, device=bands.device)[:, None]).to(power.dtype)
    energy = x.new_empty(x.shape[0], 1, count, x.shape[2])
    return _along(power.flatten(1, 2).unsqueeze(1), members, energy, True).squeeze(1)


def band_energy_backward(
    grad: Tensor,
    x: Tensor,
    bands: Tensor,
    along_h: Tensor | None,
    along_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
    fourier: bool,
) -> Tensor:
    """See ``band_energy.band_energy_backward``."""
    spectrum = _Spectrum(along_h, along_w, width, fourier, _exact(x.dtype))
    named = (bands >= 0) & (bands < grad.shape[1])
    share = 2 * grad.float().index_select(1, bands.clamp(0, grad.shape[1] - 1)) * named[:, None]
    parts = spectrum.of(_grid_of(x, height, width, prefix_tokens))
    parts = tuple(part * share.reshape(part.shape) for part in parts)
    return _behind_zeros(x, spectrum, parts, height, width, prefix_tokens)


def token_energy(
    x: Tensor, kept: Tensor, along_h: Tensor | None, along_w: Tensor, height: int, width: int, prefix_tokens: int
) -> Tensor:
    """See ``token_energy.token_energy``."""
    high = _kept(_Spectrum(along_h, along_w, width, kept.dim() == 3, True), x, kept, height, width, prefix_tokens)
    return torch.nn.functional.pad(high.square().sum(-1).flatten(1), (prefix_tokens, 0))


def token_energy_backward(
    grad: Tensor,
    x: Tensor,
    kept: Tensor,
    along_h: Tensor | None,
    along_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
) -> Tensor:
    """See ``token_energy.token_energy_backward``."""
    spectrum = _Spectrum(along_h, along_w, width, kept.dim() == 3, _exact(x.dtype))
    high = _kept(spectrum, x, kept, height, width, prefix_tokens)
    high *= 2 * grad[:, prefix_tokens:].reshape(*high.shape[:3], 1)
    factor = kept if spectrum.fourier else kept[..., None]
    parts = tuple(part * factor for part in spectrum.of(high))
    return _behind_zeros(x, spectrum, parts, height, width, prefix_tokens)


def _kept(spectrum: _Spectrum, x: Tensor, kept: Tensor, height: int, width: int, prefix_tokens: int) -> Tensor:
    """What the coefficients in ``kept`` make of the tokens, float32 ``[B, H, W, D]``."""
    factor = kept if spectrum.fourier else kept[..., None]
    parts = tuple(part * factor for part in spectrum.of(_grid_of(x, height, width, prefix_tokens)))
    return spectrum.back(parts, kept.new_empty(x.shape[0], height, width, x.shape[2]))


def _behind_zeros(
    x: Tensor,
    spectrum: _Spectrum,
    parts: tuple[Tensor, ...],
    height: int,
    width: int,
    prefix_tokens: int,
) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[:, :prefix_tokens] = 0
    spectrum.back(parts, _grid_of(out, height, width, prefix_tokens))
    return out
