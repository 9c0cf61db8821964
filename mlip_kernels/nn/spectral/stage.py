"""The Frequency Stage: light blocks that mix tokens in the frequency domain."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlip_kernels._arguments import (
    LARGEST_SIZE,
    check_choice,
    check_integer,
    check_new_grid,
    check_number,
)
from mlip_kernels.nn.spectral.filter import Lengths, SpectralFilter
from mlip_kernels.nn.spectral.mixers import ComplexMLP, FilterBank, check_module_tokens

MIXERS = ("filter", "filter_bank", "complex_mlp", "none")


def _mixer(mixer: str, dim: int, grid: int | tuple[int, int], basis: str, filters: int) -> nn.Module:
    pair = grid if isinstance(grid, tuple) else (1, grid)
    if mixer == "filter_bank":
        return FilterBank(dim, pair, filters)
    if mixer == "complex_mlp":
        return ComplexMLP(dim, pair)
    return SpectralFilter(dim, grid, basis=basis) if mixer == "filter" else nn.Identity()


class _FrequencyBlock(nn.Module):
    """``x + MLP(LN(filter(LN(x))))``, the block of GFNet."""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float) -> None:
        super().__init__()
        hidden = max(1, int(dim * mlp_ratio))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.filter = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        fc1, fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        for layer in (fc1, fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))

    def forward(self, x: Tensor, grid: Lengths | None) -> Tensor:
        y = self.norm1(x)
        y = self.filter(y) if grid is None else self.filter(y, grid)
        return x + self.mlp(self.norm2(y))


class FrequencyStage(nn.Module):
    """A few light blocks that mix the patch tokens in the frequency domain; an MLIP-style Frequency Stage.

    Each block is ``x + MLP(LN(filter(LN(x))))`` on all patch tokens, before any of them is merged. The MLP after the
    filter matters: without a non-linearity a mean over the tokens would see nothing but the zero frequency.

    Args:
        dim: channels D.
        grid: ``(H, W)`` of the patches.
        depth: number of blocks, at least 1.
        transform: ``"grid"`` filters over the patch grid, ``"tokens"`` over the one axis of ``H · W`` tokens.
        basis: ``"rfft"`` or ``"dct"``; ``"dct"`` goes with the mixers ``"filter"`` and ``"none"``.
        mlp_ratio: hidden width of the MLP, in multiples of D.
        mixer: ``"filter"`` (`SpectralFilter`), ``"filter_bank"`` (`mlip_kernels.nn.spectral.FilterBank`),
            ``"complex_mlp"`` (`mlip_kernels.nn.spectral.ComplexMLP`), or ``"none"`` (no mixing: a control).
        filters: number of filters in the bank.

    The attribute ``gradient_checkpointing`` (``False``) recomputes each block in the backward pass instead of keeping
    its intermediate results.
    """

    def __init__(
        self,
        dim: int,
        grid: Sequence[int],
        depth: int = 2,
        *,
        transform: str = "grid",
        basis: str = "rfft",
        mlp_ratio: float = 4.0,
        mixer: str = "filter",
        filters: int = 4,
    ) -> None:
        super().__init__()
        dim = check_integer("dim", dim, minimum=1, maximum=LARGEST_SIZE)
        check_choice("transform", transform, ("grid", "tokens"))
        check_choice("mixer", mixer, MIXERS)
        check_choice("basis", basis, ("rfft", "dct") if mixer in ("filter", "none") else ("rfft",))
        mlp_ratio = check_number("mlp_ratio", mlp_ratio, minimum=0.0, maximum=LARGEST_SIZE / dim)
        filters = check_integer("filters", filters, minimum=1, maximum=LARGEST_SIZE)
        depth = check_integer("depth", depth, minimum=1, maximum=LARGEST_SIZE)
        self.dim = dim
        self.grid = check_new_grid("grid", grid)
        self.transform = transform
        self.mixer = mixer
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList(
            _FrequencyBlock(dim, _mixer(mixer, dim, self._transformed(self.grid), basis, filters), mlp_ratio)
            for _ in range(depth)
        )

    def _transformed(self, grid: tuple[int, int]) -> int | tuple[int, int]:
        return grid if self.transform == "grid" else grid[0] * grid[1]

    def forward(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Turn patch tokens ``[B, N, D]`` into frequency tokens ``[B, N, D]``.

        ``grid`` is ``(H, W)`` of x where it differs from the one at construction; the mixer ``"filter"`` resamples its
        weight for it, the others cannot.
        """
        current = self.grid if grid is None else check_new_grid("grid", grid)
        check_module_tokens(x, self.dim, current, next(self.parameters()))
        other = None if current == self.grid else self._transformed(current)
        if other is not None and self.mixer != "filter":
            raise ValueError(f"grid: expected {self.grid} for mixer={self.mixer!r}, got {current}")
        for block in self.blocks:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, other, use_reentrant=False)
            else:
                x = block(x, other)
        return x

    def extra_repr(self) -> str:
        return f"grid={self.grid}, transform={self.transform!r}"
