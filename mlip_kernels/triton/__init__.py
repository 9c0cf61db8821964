"""Triton kernels and their launchers, imported at the first CUDA call."""
