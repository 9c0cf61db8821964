"""The spectrum of tokens as amplitude and phase."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlip_kernels._arguments import check_grid_tokens, check_number
from mlip_kernels._operator import Operator
from mlip_kernels._tracing import hypot
from mlip_kernels.spectral.constants import Grid, compute_dtype
from mlip_kernels.spectral.rfft import RFFT, RFFTAdjoint


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

    Saved for backward: x, from which the spectrum is computed again. It can be differentiated any number of times.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    return _amplitude_phase(x, grid, eps, prefix_tokens)


class AmplitudePhase(Operator):
    """``AmplitudePhase.apply(x, grid=None, eps=1e-6, prefix_tokens=0)``: `amplitude_phase`. Saved for backward: x."""

    schema = (
        "amplitude_phase(Tensor x, SymInt[]? grid, float eps, SymInt prefix_tokens) -> (Tensor amplitude, Tensor phase)"
    )
    kernels, differentiable = False, 2

    @staticmethod
    def check(
        x: Tensor, grid: Sequence[int] | None = None, eps: float = 1e-6, prefix_tokens: int = 0
    ) -> tuple[Any, ...]:
        x, grid, prefix_tokens = check_grid_tokens(x, grid, prefix_tokens)
        return x, grid, check_number("eps", eps, minimum=0.0), prefix_tokens

    @staticmethod
    def takes(x: Tensor, grid: Grid | None, eps: float, prefix_tokens: int) -> bool:
        return RFFT.takes(x, grid, "ortho", prefix_tokens)

    @staticmethod
    def compute(x: Tensor, grid: Grid | None, eps: float, prefix_tokens: int) -> tuple[Tensor, Tensor]:
        real, imag = RFFT.compute(x.to(compute_dtype(x)), grid, "ortho", prefix_tokens)
        return torch.hypot(real, imag).to(x.dtype), torch.atan2(imag, real).to(x.dtype)

    @staticmethod
    def fake(x: Tensor, grid: Grid | None, eps: float, prefix_tokens: int) -> tuple[Tensor, Tensor]:
        return RFFT.fake(x, grid, "ortho", prefix_tokens)

    @staticmethod
    def plain(x: Tensor, grid: Grid | None, eps: float, prefix_tokens: int) -> tuple[Tensor, Tensor]:
        real, imag = _plain_rfft(x.to(compute_dtype(x)), grid, "ortho", prefix_tokens)
        with torch.no_grad():
            amplitude, phase = hypot(real, imag), torch.atan2(imag, real)
            defined = amplitude >= _least(eps, real.dtype)
        # Both branches of a where() receive a gradient: the unused one must be finite as well, hence the point (1, 0).
        real = torch.where(defined, real, 1.0)
        imag = torch.where(defined, imag, 0.0)
        amplitude = torch.where(defined, hypot(real, imag), amplitude)
        phase = torch.where(defined, torch.atan2(imag, real), phase)
        return amplitude.to(x.dtype), phase.to(x.dtype)

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.grid, ctx.eps, ctx.prefix_tokens = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def gradients(ctx: Any, grad_amplitude: Tensor | None, grad_phase: Tensor | None) -> Tensor | None:
        (x,) = ctx.saved_tensors
        real, imag = _rfft_run(x.to(compute_dtype(x)), ctx.grid, "ortho", ctx.prefix_tokens)
        defined = torch.hypot(real, imag) >= _least(ctx.eps, real.dtype)
        # As in `plain`: where nothing is defined, the point (1, 0) keeps higher derivatives finite.
        real, imag = torch.where(defined, real, 1.0), torch.where(defined, imag, 0.0)
        grad_real = grad_imag = torch.zeros_like(real)
        if grad_amplitude is not None:
            along, amplitude = torch.where(defined, grad_amplitude.to(real.dtype), 0.0), torch.hypot(real, imag)
            grad_real, grad_imag = along * real / amplitude, along * imag / amplitude
        if grad_phase is not None:
            across = torch.where(defined, grad_phase.to(real.dtype), 0.0)
            inverse = (real * real + imag * imag).reciprocal()
            grad_real = grad_real + across * -imag * inverse
            grad_imag = grad_imag + across * real * inverse
        return _rfft_adjoint(grad_real, grad_imag, x.shape[1], ctx.grid, "ortho", ctx.prefix_tokens)


_amplitude_phase = AmplitudePhase.call
_plain_rfft, _rfft_run, _rfft_adjoint = RFFT.plain, RFFT.run, RFFTAdjoint.run


def _least(eps: float, dtype: torch.dtype) -> float:
    """The least amplitude with a gradient: below the root of the least normal number atan2 squares to zero."""
    return max(eps, math.sqrt(torch.finfo(dtype).tiny))
