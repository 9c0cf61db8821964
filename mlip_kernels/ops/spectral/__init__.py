"""Spectral operators: tokens ``[B, N, D]`` by frequency, over the token axis or the patch grid."""

from mlip_kernels.ops.spectral.energies import amplitude_phase, band_energy, token_energy
from mlip_kernels.ops.spectral.filters import spectral_filter
from mlip_kernels.ops.spectral.transforms import dct, idct, irfft, rfft, spectral_resize

__all__ = [
    "amplitude_phase",
    "band_energy",
    "dct",
    "idct",
    "irfft",
    "rfft",
    "spectral_filter",
    "spectral_resize",
    "token_energy",
]
