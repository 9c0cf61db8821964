"""Energies of tokens by frequency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_kernels._arguments import (
    INTEGERS,
    check_choice,
    check_grid_tokens,
    check_integer,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
)
from mlip_kernels._operator import Operator, define_backward
from mlip_kernels.spectral import kernels, long_axes, plain
from mlip_kernels.spectral.constants import (
    Grid,
    argument_layout,
    axes_of,
    basis_matrices,
    compute_dtype,
    constant,
    equal_bands,
    high_pass,
    spectrum_shape,
)

LARGEST_BAND_MATRIX = 2**30
"""The most elements of the matrix ``[bands, coefficients]`` that plain PyTorch multiplies by."""


def band_energy(
    x: Tensor,
    bands: int | Tensor,
    *,
    grid: Sequence[int] | None = None,
    basis: str = "dct",
    prefix_tokens: int = 0,
) -> Tensor:
    """Sum of squared orthonormal coefficients in each frequency band.

    The normalised frequency of coefficient k on an axis of length n is ``f = k / n`` for the DCT and ``2 |k| / n`` for
    the FFT (k counted from -n/2, so Nyquist is 1); on a grid ``ρ = sqrt((f_h² + f_w²) / 2)``, on the token axis
    ``ρ = f``. Of K bands of equal width, band b takes ``b / K <= ρ < (b + 1) / K``, and the last one also ``ρ = 1``;
    edges are compared exactly. Coefficients that `rfft` leaves out as mirror images count with their image. Hence
    Parseval's identity in both bases: the sum over the bands is the sum of squares over the tokens.

    Args:
        x: tokens ``[B, N, D]``; float32, bfloat16, float16 or float64. B may be 0.
        bands: the number of bands of equal width, or an integer tensor that names the band, from 0, of each
            coefficient: ``[n]`` or ``[H, W]`` for the DCT, ``[n // 2 + 1]`` or ``[H, W // 2 + 1]`` for the FFT, with
            ``n = N - prefix_tokens``. A tensor lies on the CPU or on the device of x; its values are read, which
            synchronises unless it lies on the CPU, and cannot be traced by ``torch.compile(fullgraph=True)``.
        grid: ``(H, W)`` with ``H · W = n``, or ``None`` for the token axis.
        basis: ``"dct"`` (type 2) or ``"rfft"``.
        prefix_tokens: leading class or register tokens, which are left out.

    Returns:
        ``[B, bands, D]`` in the dtype of x, with as many bands as the tensor's largest value plus 1; a band without
        coefficients is 0. Computed in float32 and rounded once for half precision: a float16 energy beyond 65504 is
        infinite.

    Saved for backward: x, from which the spectrum is computed again; long axes and the range of values are described in
    `mlip_kernels.spectral`. The second derivative raises RuntimeError
    (`mlip_kernels.use_reference` computes it).

    Raises:
        TypeError, ValueError: naming the argument; negative band numbers, and more than 2³⁰ bands times coefficients.
    """
    return _band_energy(x, bands, grid, basis, prefix_tokens)


def token_energy(
    x: Tensor,
    cutoff: float,
    *,
    grid: Sequence[int] | None = None,
    basis: str = "dct",
    prefix_tokens: int = 0,
) -> Tensor:
    """High-frequency energy at each token: what is left of it without the low frequencies, squared, over channels.

    Coefficients with ``ρ < cutoff`` are set to zero (ρ as in `band_energy`; one that is a rational number is correctly
    rounded to float64 before it is compared), the rest is transformed back, and its squares are summed over D. Large
    where a token differs from its surroundings: a guide for merging tokens.

    Args:
        x: tokens ``[B, N, D]``; float32, bfloat16, float16 or float64. B may be 0.
        cutoff: the lowest normalised frequency that is kept, in [0, 1]; 0 keeps all.
        grid: ``(H, W)`` with ``H · W = N - prefix_tokens``, or ``None`` for the token axis.
        basis: ``"dct"`` (type 2) or ``"rfft"``.
        prefix_tokens: leading class or register tokens, which are left out of the spectrum; their energy is 0.

    Returns:
        ``[B, N]`` in float32, in float64 for a float64 x. Equal tokens have energy 0 up to rounding for any cutoff
        above 0.

    Saved for backward: x, from which the filtered tokens are computed again; long axes and the range of values are
    described in `mlip_kernels.spectral`. The second derivative raises
    RuntimeError (`mlip_kernels.use_reference` computes it).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    return _token_energy(x, cutoff, grid, basis, prefix_tokens)


class BandEnergy(Operator):
    """``BandEnergy.apply(x, bands, grid=None, basis="dct", prefix_tokens=0)``: `band_energy`.

    Saved for backward: x, and the bands where they are a tensor. The second derivative raises.
    """

    schema = (
        "band_energy(Tensor x, Tensor? bands, SymInt[]? grid, str basis, SymInt prefix_tokens, SymInt count) -> Tensor"
    )
    kernels = False

    @staticmethod
    def check(
        x: Tensor,
        bands: int | Tensor,
        grid: Sequence[int] | None = None,
        basis: str = "dct",
        prefix_tokens: int = 0,
    ) -> tuple[Any, ...]:
        x, grid, prefix_tokens = check_grid_tokens(x, grid, prefix_tokens)
        check_choice("basis", basis, ("dct", "rfft"))
        shape = spectrum_shape(grid or (x.shape[1] - prefix_tokens,), basis)
        bands, count = check_bands(bands, x, shape, argument_layout(grid, basis))
        return x, bands if isinstance(bands, Tensor) else None, grid, basis, prefix_tokens, count

    @staticmethod
    def takes(x: Tensor, bands: Tensor | None, grid: Grid | None, basis: str, prefix_tokens: int, count: int) -> bool:
        return not long_axes.is_long(*axes_of(x, grid, prefix_tokens))

    @staticmethod
    def compute(
        x: Tensor, bands: Tensor | None, grid: Grid | None, basis: str, prefix_tokens: int, count: int
    ) -> Tensor:
        axes = axes_of(x, grid, prefix_tokens)
        named, matrices = _named(bands, count, x, grid, axes, basis), basis_matrices(x, *axes, grid, basis)
        return kernels.band_energy(x, named, count, *matrices, *axes, prefix_tokens, basis == "rfft")

    @staticmethod
    def fake(x: Tensor, bands: Tensor | None, grid: Grid | None, basis: str, prefix_tokens: int, count: int) -> Tensor:
        return x.new_empty(x.shape[0], count, x.shape[2])

    @staticmethod
    def plain(x: Tensor, bands: Tensor | None, grid: Grid | None, basis: str, prefix_tokens: int, count: int) -> Tensor:
        axes = axes_of(x, grid, prefix_tokens)
        named = _named(bands, count, x, grid, axes, basis)
        if not long_axes.is_long(*axes):
            matrices = basis_matrices(x, *axes, grid, basis)
            return plain.band_energy(x, named, count, *matrices, *axes, prefix_tokens, basis == "rfft")
        plane = long_axes.plane(x, *axes, prefix_tokens)
        members = plain.band_members(named, count, *axes, plane, basis == "rfft")
        return long_axes.band_energy(plane, members, basis, grid is not None).to(x.dtype)

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bands, *ctx.arguments, _ = inputs
        ctx.save_for_backward(x, bands)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Tensor:
        return _band_energy_backward(grad, *ctx.saved_tensors, *ctx.arguments)


class TokenEnergy(Operator):
    """``TokenEnergy.apply(x, cutoff, grid=None, basis="dct", prefix_tokens=0)``: `token_energy`.

    Saved for backward: x. The second derivative raises.
    """

    schema = "token_energy(Tensor x, float cutoff, SymInt[]? grid, str basis, SymInt prefix_tokens) -> Tensor"
    kernels = False

    @staticmethod
    def check(
        x: Tensor, cutoff: float, grid: Sequence[int] | None = None, basis: str = "dct", prefix_tokens: int = 0
    ) -> tuple[Any, ...]:
        x, grid, prefix_tokens = check_grid_tokens(x, grid, prefix_tokens)
        cutoff = check_number("cutoff", cutoff, minimum=0.0, maximum=1.0)
        check_choice("basis", basis, ("dct", "rfft"))
        return x, cutoff, grid, basis, prefix_tokens

    @staticmethod
    def takes(x: Tensor, cutoff: float, grid: Grid | None, basis: str, prefix_tokens: int) -> bool:
        return not long_axes.is_long(*axes_of(x, grid, prefix_tokens))

    @staticmethod
    def compute(x: Tensor, cutoff: float, grid: Grid | None, basis: str, prefix_tokens: int) -> Tensor:
        axes = axes_of(x, grid, prefix_tokens)
        high, matrices = _high(cutoff, x, grid, axes, basis), basis_matrices(x, *axes, grid, basis)
        return kernels.token_energy(x, high, *matrices, *axes, prefix_tokens)

    @staticmethod
    def fake(x: Tensor, *arguments: Any) -> Tensor:
        return x.new_empty(x.shape[:2], dtype=compute_dtype(x))

    @staticmethod
    def plain(x: Tensor, cutoff: float, grid: Grid | None, basis: str, prefix_tokens: int) -> Tensor:
        axes = axes_of(x, grid, prefix_tokens)
        high = _high(cutoff, x, grid, axes, basis)
        if not long_axes.is_long(*axes):
            return plain.token_energy(x, high, *basis_matrices(x, *axes, grid, basis), *axes, prefix_tokens)
        weight = high.reshape(axes[0], -1, 1)
        if basis == "rfft":
            weight = torch.stack((weight, torch.zeros_like(weight)), -1)
        filtered = long_axes.filtered(long_axes.plane(x, *axes, prefix_tokens), weight, grid is not None)
        return F.pad(filtered.square().sum(-1).flatten(1), (prefix_tokens, 0))

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *ctx.arguments = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Tensor:
        return _token_energy_backward(grad, *ctx.saved_tensors, *ctx.arguments)


def _named(bands: Tensor | None, count: int, x: Tensor, grid: Grid | None, axes: tuple[int, int], basis: str) -> Tensor:
    """The band of each coefficient, int32 and flat: as given, or ``count`` of equal width."""
    if bands is None:
        shape = tuple(grid) if grid else axes[1:]
        return constant(equal_bands, shape, basis, count, device=x.device, dtype=torch.int32).flatten()
    return bands.to(x.device, torch.int32).flatten()


def _high(cutoff: float, x: Tensor, grid: Grid | None, axes: tuple[int, int], basis: str) -> Tensor:
    """1 for the coefficients from ``cutoff`` on, else 0: ``[H, W]``, or ``[H, K, 1]`` for the FFT."""
    shape = tuple(grid) if grid else axes[1:]
    high = constant(high_pass, shape, basis, cutoff, device=x.device, dtype=compute_dtype(x))
    return high.reshape(axes) if basis == "dct" else high.reshape(axes[0], axes[1] // 2 + 1, 1)


def _compute_band_energy_backward(
    grad: Tensor, x: Tensor, bands: Tensor | None, grid: Grid | None, basis: str, prefix_tokens: int
) -> Tensor:
    axes = axes_of(x, grid, prefix_tokens)
    named, matrices = _named(bands, grad.shape[1], x, grid, axes, basis), basis_matrices(x, *axes, grid, basis)
    return kernels.band_energy_backward(grad, x, named, *matrices, *axes, prefix_tokens, basis == "rfft")


def _compute_token_energy_backward(
    grad: Tensor, x: Tensor, cutoff: float, grid: Grid | None, basis: str, prefix_tokens: int
) -> Tensor:
    axes = axes_of(x, grid, prefix_tokens)
    high, matrices = _high(cutoff, x, grid, axes, basis), basis_matrices(x, *axes, grid, basis)
    return kernels.token_energy_backward(grad, x, high, *matrices, *axes, prefix_tokens)


def _fake_backward(grad: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape)


_band_energy, _token_energy = BandEnergy.call, TokenEnergy.call
_band_energy_backward = define_backward(
    "band_energy_backward(Tensor grad, Tensor x, Tensor? bands, SymInt[]? grid, str basis, SymInt prefix_tokens)"
    " -> Tensor",
    compute=_compute_band_energy_backward,
    fake=_fake_backward,
    kernels=False,
)
_token_energy_backward = define_backward(
    "token_energy_backward(Tensor grad, Tensor x, float cutoff, SymInt[]? grid, str basis, SymInt prefix_tokens)"
    " -> Tensor",
    compute=_compute_token_energy_backward,
    fake=_fake_backward,
    kernels=False,
)


def check_bands(bands: object, x: Tensor, shape: Sequence[int], layout: str) -> tuple[int | Tensor, int]:
    """Return the bands, as they are, and their number; for a tensor this reads its values."""
    if isinstance(bands, Tensor) and bands.dim():
        check_tensor("bands", bands, layout=layout, dtypes=INTEGERS)
        check_shape("bands", bands, shape, layout)
        if bands.device.type != "cpu":
            check_same_device("bands", bands, "x", x)
        if bands.device.type == "meta":
            raise ValueError("bands: expected a tensor whose values can be read, got one on meta")
        lowest, highest = int(bands.min()), int(bands.max())
        if lowest < 0:
            raise ValueError(f"bands: expected band numbers from 0 on, got {lowest}")
        count = highest + 1
    else:
        bands = count = check_integer("bands", bands, minimum=1)
    coefficients = 1
    for length in shape:
        coefficients *= length
    if count * coefficients > LARGEST_BAND_MATRIX:
        raise ValueError(
            f"bands: expected bands * coefficients <= {LARGEST_BAND_MATRIX}, got {count} bands of {coefficients}"
        )
    return bands, count
