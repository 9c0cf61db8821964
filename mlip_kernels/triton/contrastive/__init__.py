"""Triton kernels of the contrastive family and their launchers."""
