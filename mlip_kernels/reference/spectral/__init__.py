"""Spectral family in plain PyTorch: the definition of right, on any device and in any dtype.

Half precision is widened to float32, transformed, and narrowed once. Autocast changes nothing, forward or backward.
"""

from mlip_kernels.reference.spectral.energies import amplitude_phase, band_energy, token_energy
from mlip_kernels.reference.spectral.filters import spectral_filter
from mlip_kernels.reference.spectral.transforms import dct, idct, irfft, rfft, spectral_resize

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
