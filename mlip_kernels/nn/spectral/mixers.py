"""What can happen to the spectrum of tokens inside a frequency block, beside the plain filter of `SpectralFilter`.

Every mixer takes tokens ``[B, N, D]`` and returns tokens of the same shape and dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlip_kernels._arguments import (
    LARGEST_SIZE,
    check_integer,
    check_new_grid,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tokens,
)
from mlip_kernels.nn.spectral.filter import SpectralFilter
from mlip_kernels.spectral import irfft, rfft


class FilterBank(nn.Module):
    """A bank of spectral filters, mixed for every image by its content.

    The filter is linear, so the filtered tokens are mixed in place of the filters (dynamic filters of Tatsunami and
    Taki, arXiv 2303.03932; Lite-Mind, arXiv 2312.03781, mixes its bank by fixed cosines instead).

    Args:
        dim: channels D.
        grid: patches ``(height, width)``, or ``(1, N)`` for the token axis.
        filters: filters in the bank.
    """

    def __init__(self, dim: int, grid: tuple[int, int], filters: int) -> None:
        super().__init__()
        self.dim, self.grid = _sizes(dim, grid)
        filters = check_integer("filters", filters, minimum=1, maximum=LARGEST_SIZE)
        self.filters = nn.ModuleList(SpectralFilter(self.dim, self.grid) for _ in range(filters))
        self.choice = nn.Linear(self.dim, filters)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the filtered tokens with weights that sum to 1 for every image."""
        check_module_tokens(x, self.dim, self.grid, self.choice.weight)
        shares = self.choice(x.mean(1)).softmax(-1).to(x.dtype)
        mixed = torch.zeros_like(x)
        for place, spectral_filter in enumerate(self.filters):
            mixed = mixed + shares[:, place, None, None] * spectral_filter(x)
        return mixed


class ComplexMLP(nn.Module):
    """A complex linear layer over the channels of every coefficient, with ReLU and soft thresholding.

    ``Re = relu(X_r W_r − X_i W_i + b_r)``, ``Im = relu(X_i W_r + X_r W_i + b_i)``, then soft shrinkage by 0.01
    (FreTS, arXiv 2311.06184, equation 7, with full D × D weights).

    Args:
        dim: channels D.
        grid: patches ``(height, width)``, or ``(1, N)`` for the token axis.
    """

    THRESHOLD = 0.01

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        dim, self.grid = _sizes(dim, grid)
        self.dim = dim
        self.weight_real = nn.Linear(dim, dim, bias=False)
        self.weight_imaginary = nn.Linear(dim, dim, bias=False)
        self.bias_real = nn.Parameter(torch.zeros(dim))
        self.bias_imaginary = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Transform, mix the channels of every coefficient, transform back."""
        check_module_tokens(x, self.dim, self.grid, self.weight_real.weight)
        real, imaginary = rfft(x, grid=self.grid)
        mixed_real = self.weight_real(real) - self.weight_imaginary(imaginary) + self.bias_real
        mixed_imaginary = self.weight_real(imaginary) + self.weight_imaginary(real) + self.bias_imaginary
        real = F.softshrink(F.relu(mixed_real), self.THRESHOLD)
        imaginary = F.softshrink(F.relu(mixed_imaginary), self.THRESHOLD)
        return irfft(real.to(x.dtype), imaginary.to(x.dtype), grid=self.grid)


def _sizes(dim: object, grid: object) -> tuple[int, tuple[int, int]]:
    return check_integer("dim", dim, minimum=1, maximum=LARGEST_SIZE), check_new_grid("grid", grid)


def check_module_tokens(x: object, dim: int, grid: tuple[int, int], parameter: Tensor) -> None:
    """Raise unless ``x [B, H · W, D]`` has the device of a module's parameters, and their dtype or autocast."""
    tokens = check_tokens("x", x)
    check_shape("x", tokens, [tokens.shape[0], grid[0] * grid[1], dim], "[B, H * W, D]")
    check_same_device("x", tokens, "the parameters", parameter)
    check_same_dtype("x", tokens, "the parameters", parameter)
