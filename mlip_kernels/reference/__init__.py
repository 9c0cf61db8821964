"""Every operator in plain PyTorch: the definition of right. Knows nothing of kernels."""
