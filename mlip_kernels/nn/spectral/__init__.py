"""Modules that mix tokens in the frequency domain."""

from mlip_kernels.nn.spectral.filter import SpectralFilter, resample_filter
from mlip_kernels.nn.spectral.mixers import ComplexMLP, FilterBank
from mlip_kernels.nn.spectral.stage import FrequencyStage

__all__ = ["ComplexMLP", "FilterBank", "FrequencyStage", "SpectralFilter", "resample_filter"]
