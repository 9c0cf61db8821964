"""Energies of tokens by frequency, and their spectrum as amplitude and phase."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mlip_kernels.ops.arguments import check_choice, check_number
from mlip_kernels.ops.spectral.checks import argument_layout, check_bands, check_grid_tokens, spectrum_shape
from mlip_kernels.ops.spectral.primitives import primitives
from mlip_kernels.reference import spectral as reference


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
    `mlip_kernels.ops.spectral`. The second derivative raises RuntimeError
    (`mlip_kernels.use_reference` computes it).

    Raises:
        TypeError, ValueError: naming the argument; negative band numbers, and more than 2³⁰ bands times coefficients.
    """
    x, grid, prefix_tokens = check_grid_tokens(x, grid, prefix_tokens)
    check_choice("basis", basis, ("dct", "rfft"))
    shape = spectrum_shape(x.shape[1] - prefix_tokens, grid, basis)
    bands, count = check_bands(bands, x, shape, argument_layout(grid, basis))
    return reference.band_energy(x, bands, count, grid, basis, prefix_tokens, primitives())


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
    described in `mlip_kernels.ops.spectral`. The second derivative raises
    RuntimeError (`mlip_kernels.use_reference` computes it).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    x, grid, prefix_tokens = check_grid_tokens(x, grid, prefix_tokens)
    cutoff = check_number("cutoff", cutoff, minimum=0.0, maximum=1.0)
    check_choice("basis", basis, ("dct", "rfft"))
    return reference.token_energy(x, cutoff, grid, basis, prefix_tokens, primitives())


def amplitude_phase(
    x: Tensor, *, grid: Sequence[int] | None = None, eps: float = 1e-6, prefix_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """Amplitude and phase of the orthonormal real FFT, with gradients that are finite everywhere.

    ``amplitude = sqrt(re² + im²)`` and ``phase = atan2(im, re)`` in (-π, π], exact for every coefficient (the phase of
    a zero coefficient is 0). Their derivatives do not exist at zero and explode near it; they are defined as 0 for
    every coefficient with an amplitude below eps.

    Args:
        x: tokens ``[B, N, D]``; float32, bfloat16, float16 or float64. B may be 0.
        grid: ``(H, W)`` with ``H · W = n = N - prefix_tokens``, or ``None`` for the token axis.
        eps: the amplitude below which gradients are 0, at least 0. The square root of the smallest normal number
            (1.1e-19 in float32) is the least that is used. Rounding alone leaves amplitudes of about 1e-7 times
            the norm of the tokens in float32: choose eps above it if the phase matters there.
        prefix_tokens: leading class or register tokens, which are left out.

    Returns:
        ``(amplitude, phase)`` in the dtype of x, each ``[B, n // 2 + 1, D]`` or ``[B, H, W // 2 + 1, D]``. Half
        precision is computed in float32 and rounded once.

    Saved for backward: real and imaginary part, amplitude and mask, about ``7 · B · (N + 2 H) · D`` bytes for x up to
    float32.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    x, grid, prefix_tokens = check_grid_tokens(x, grid, prefix_tokens)
    eps = check_number("eps", eps, minimum=0.0)
    return reference.amplitude_phase(x, grid, eps, prefix_tokens, primitives())
