"""Triton kernels of the spectral family and their launchers."""
