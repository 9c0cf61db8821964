"""Rows of the spectral operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import mlip_kernels as mk
from operators.case import LINEAR, Arguments, Operator, random

GRID = {"grid": (3, 4), "prefix_tokens": 1}
LONG = 1026
"""An axis beyond 1,024 points, which torch.fft transforms."""
BY_TORCH = ("long axis", "channels")
"""Samples that torch computes with a Fourier transform or a product, without a kernel of this package."""


def image(dtype: torch.dtype) -> Arguments:
    return {"x": random(5, 197, 96, dtype=dtype), "grid": (14, 14), "prefix_tokens": 1}


def cosine_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    x = random(2, 13, 9, dtype=dtype)
    return {
        "grid": {"x": x, **GRID},
        "tokens": {"x": x},
        "channels": {"x": x, "dim": 2, "prefix_tokens": 1},
        "type 1": {"x": x, "type": 1, "norm": "backward", **GRID},
        "type 3": {"x": x, "type": 3, "norm": "forward"},
        "type 4": {"x": x, "type": 4, "norm": "forward", "prefix_tokens": 5},
        "long axis": {"x": random(1, 1 + LONG, 2, dtype=dtype), "prefix_tokens": 1},
    }


def rfft_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    x = random(2, 13, 9, dtype=dtype)
    return {
        "grid": {"x": x, **GRID},
        "tokens": {"x": x, "norm": "backward"},
        "long axis": {"x": random(1, 1 + LONG, 2, dtype=dtype), "prefix_tokens": 1},
    }


def spectrum(*shape: int, dtype: torch.dtype) -> Arguments:
    return {"real": random(*shape, dtype=dtype), "imag": random(*shape, dtype=dtype, seed=1)}


def irfft_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    return {
        "grid": {**spectrum(2, 3, 3, 9, dtype=dtype), "grid": (3, 4)},
        "odd": {**spectrum(2, 7, 9, dtype=dtype), "n": 13},
        "even": {**spectrum(2, 7, 9, dtype=dtype), "norm": "forward"},
        "long axis": {**spectrum(1, LONG // 2 + 1, 2, dtype=dtype), "n": LONG},
    }


def filter_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    x, long = random(2, 13, 9, dtype=dtype), random(1, 1 + LONG, 2, dtype=dtype)
    return {
        "grid": {"x": x, "weight": random(3, 3, 9, 2, dtype=dtype, seed=1), **GRID},
        "tokens": {"x": x, "weight": random(7, 9, 2, dtype=dtype, seed=1)},
        "dct grid": {"x": x, "weight": random(3, 4, 9, dtype=dtype, seed=1), "basis": "dct", **GRID},
        "dct tokens": {"x": x, "weight": random(13, 9, dtype=dtype, seed=1), "basis": "dct"},
        "long axis": {
            "x": long,
            "weight": random(LONG // 2 + 1, 2, 2, dtype=dtype, seed=1),
            "prefix_tokens": 1,
        },
    }


def band_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    x = random(2, 13, 9, dtype=dtype)
    named = torch.tensor([[0, 2, 1], [3, 0, 2], [1, 1, 5]])
    return {
        "grid": {"x": x, "bands": 3, **GRID},
        "rfft tokens": {"x": x, "bands": 4, "basis": "rfft"},
        "named bands": {"x": x, "bands": named, "basis": "rfft", **GRID},
        "long axis": {"x": random(1, 1 + LONG, 2, dtype=dtype), "bands": 3, "prefix_tokens": 1},
    }


def energy_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    x = random(2, 13, 9, dtype=dtype)
    return {
        "grid": {"x": x, "cutoff": 0.4, **GRID},
        "rfft tokens": {"x": x, "cutoff": 0.4, "basis": "rfft", "prefix_tokens": 1},
        "rfft grid": {"x": x, "cutoff": 0.4, "basis": "rfft", **GRID},
        "long axis": {"x": random(1, 1 + LONG, 2, dtype=dtype), "cutoff": 0.4, "prefix_tokens": 1},
    }


def resize_samples(dtype: torch.dtype) -> dict[str, Arguments]:
    x = random(2, 13, 9, dtype=dtype)
    return {
        "other axes": {"x": x, "grid": (3, 4), "new_grid": (2, 5), "prefix_tokens": 1},
        "larger": {"x": x[:, 1:], "grid": (3, 4), "new_grid": (6, 5), "rescale": False},
        "long axis": {"x": random(1, LONG, 2, dtype=dtype), "grid": (1, LONG), "new_grid": (2, 1030)},
    }


def on_the_circle(amplitude: Tensor, phase: Tensor) -> Sequence[Tensor]:
    """The phase of a real coefficient is 0, π or -π by the sign of a zero, and that of a small one is rounding."""
    return amplitude, amplitude * phase.cos(), amplitude * phase.sin()


def separable(name: str) -> Operator:
    return Operator(
        name,
        getattr(mk, name),
        cosine_samples,
        image,
        (name, "spectral_separable"),
        ("x",),
        LINEAR,
    )


SPECTRAL = [
    separable("dct"),
    separable("idct"),
    Operator(
        "rfft",
        mk.rfft,
        rfft_samples,
        image,
        ("rfft", "spectral_analysis"),
        ("x",),
        LINEAR,
    ),
    Operator(
        "irfft",
        mk.irfft,
        irfft_samples,
        lambda dtype: {
            "real": random(5, 14, 8, 96, dtype=dtype),
            "imag": random(5, 14, 8, 96, dtype=dtype, seed=1),
            "grid": (14, 14),
        },
        ("irfft", "spectral_synthesis"),
        ("real", "imag"),
        LINEAR,
    ),
    Operator(
        "spectral_filter",
        mk.spectral_filter,
        filter_samples,
        lambda dtype: {**image(dtype), "weight": random(14, 8, 96, 2, dtype=dtype, seed=1)},
        ("spectral_filter", "spectral_filtered"),
        ("x", "weight"),
        LINEAR,
        shared=("weight",),
    ),
    Operator(
        "band_energy",
        mk.band_energy,
        band_samples,
        lambda dtype: {**image(dtype), "bands": 4},
        ("band_energy", "spectral_band_energy"),
        ("x",),
        shared=("bands",),
    ),
    Operator(
        "token_energy",
        mk.token_energy,
        energy_samples,
        lambda dtype: {**image(dtype), "cutoff": 0.3},
        ("token_energy", "spectral_token_energy"),
        ("x",),
    ),
    Operator(
        "amplitude_phase",
        mk.amplitude_phase,
        lambda dtype: {
            name: {k: v for k, v in sample.items() if k != "norm"} for name, sample in rfft_samples(dtype).items()
        },
        image,
        ("amplitude_phase", "spectral_analysis"),
        ("x",),
        LINEAR,
        comparable=on_the_circle,
    ),
    Operator(
        "spectral_resize",
        mk.spectral_resize,
        resize_samples,
        lambda dtype: {**image(dtype), "new_grid": (7, 9)},
        ("spectral_resize", "spectral_separable"),
        ("x",),
        LINEAR,
    ),
]
