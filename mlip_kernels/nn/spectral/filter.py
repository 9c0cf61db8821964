"""The spectral filter as a module, and what its weight becomes on another grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlip_kernels._arguments import (
    LARGEST_SIZE,
    check_choice,
    check_integer,
    check_new_grid,
    check_same_device,
    check_shape,
    check_tensor,
    check_tokens,
    sequence_of,
)
from mlip_kernels.spectral import spectral_filter
from mlip_kernels.spectral.constants import spectrum_layout, spectrum_shape

Lengths = int | Sequence[int]


class SpectralFilter(nn.Module):
    """Learned filter of every channel in the frequency domain: `mlip_kernels.spectral_filter` with its weight.

    A drop-in for the global filter layer of GFNet (Rao et al., NeurIPS 2021): the parameter has its name
    ``complex_weight``, its shape ``[H, W // 2 + 1, D, 2]`` and its initial values (0.02 times standard normal), so its
    checkpoints load, and the output has the dtype of the input.

    Args:
        dim: channels D.
        grid: ``(H, W)`` filters the patch grid, a number N the token axis; both without prefix tokens.
        basis: ``"rfft"`` (a complex weight) or ``"dct"`` (a real ``weight`` of shape ``[H, W, D]`` or ``[N, D]``).
        prefix_tokens: leading class or register tokens, which pass unchanged.
    """

    def __init__(self, dim: int, grid: Lengths, *, basis: str = "rfft", prefix_tokens: int = 0) -> None:
        super().__init__()
        check_choice("basis", basis, ("rfft", "dct"))
        self.dim = check_integer("dim", dim, minimum=1, maximum=LARGEST_SIZE)
        self.grid = _lengths("grid", grid)
        self.basis = basis
        self.prefix_tokens = check_integer("prefix_tokens", prefix_tokens, minimum=0, maximum=LARGEST_SIZE)
        weight = nn.Parameter(torch.empty(_weight_shape(self.grid, basis, self.dim)))
        self.register_parameter(self._weight_name, weight)
        self.reset_parameters()

    @property
    def _weight_name(self) -> str:
        return "complex_weight" if self.basis == "rfft" else "weight"

    def reset_parameters(self) -> None:
        """Draw the weight anew: 0.02 times standard normal."""
        nn.init.normal_(getattr(self, self._weight_name), std=0.02)

    def forward(self, x: Tensor, grid: Lengths | None = None) -> Tensor:
        """Filter tokens ``[B, prefix_tokens + N, D]``; on another ``grid``, with the weight resampled for it."""
        weight = getattr(self, self._weight_name)
        check_shape("x", check_tokens("x", x), [*x.shape[:2], self.dim], "[B, N, D]")
        check_same_device("x", x, "the weight", weight)
        if grid is None:
            grid = self.grid
        else:
            grid = _like("grid", _lengths("grid", grid), self.grid)
            weight = resample_filter(weight, self.grid, grid, basis=self.basis)
        return spectral_filter(
            x,
            weight,
            grid=grid if isinstance(grid, tuple) else None,
            basis=self.basis,
            prefix_tokens=self.prefix_tokens,
        )

    @torch.no_grad()
    def set_grid(self, grid: Lengths) -> None:
        """Move to another grid for good; the resampled weight is a new parameter, unknown to existing optimizers."""
        grid = _like("grid", _lengths("grid", grid), self.grid)
        weight: nn.Parameter = getattr(self, self._weight_name)
        resampled = resample_filter(weight, self.grid, grid, basis=self.basis)
        setattr(self, self._weight_name, nn.Parameter(resampled.clone(), requires_grad=weight.requires_grad))
        self.grid = grid

    def extra_repr(self) -> str:
        return f"dim={self.dim}, grid={self.grid}, basis={self.basis!r}, prefix_tokens={self.prefix_tokens}"


def resample_filter(weight: Tensor, grid: Lengths, new_grid: Lengths, *, basis: str = "rfft") -> Tensor:
    """The weight of a spectral filter for another grid or number of tokens, with the same response per frequency.

    Coefficient k of n new ones takes the old weight at the normalised frequency of k, interpolated linearly along each
    axis; the rows of an FFT are a circle, and beyond the last frequency the last weight holds. The same grid gives the
    weight itself.

    Args:
        weight: ``[H, W // 2 + 1, D, 2]`` or ``[N // 2 + 1, D, 2]`` for ``"rfft"``, ``[H, W, D]`` or ``[N, D]`` for
            ``"dct"``.
        grid: ``(H, W)`` or the number of tokens N that the weight is made for.
        new_grid: of the same kind.
        basis: ``"rfft"`` or ``"dct"``.
    """
    check_choice("basis", basis, ("rfft", "dct"))
    grid = _lengths("grid", grid)
    new_grid = _like("new_grid", _lengths("new_grid", new_grid), grid)
    layout = spectrum_layout(_pair(grid), basis, ", D, 2" if basis == "rfft" else ", D")
    check_tensor("weight", weight, layout=layout)
    axes, new_axes = _axes(grid), _axes(new_grid)
    check_shape("weight", weight, _weight_shape(grid, basis, weight.shape[len(axes)]), layout)
    for axis, (n, new_n) in enumerate(zip(axes, new_axes, strict=True)):
        if n != new_n:
            last = axis == len(axes) - 1
            weight = _resample_axis(weight, axis, n, new_n, circular=basis == "rfft" and not last, half=basis == "rfft")
    return weight


def _resample_axis(weight: Tensor, axis: int, n: int, new_n: int, *, circular: bool, half: bool) -> Tensor:
    count = weight.shape[axis]
    k = torch.arange(new_n // 2 + 1 if half and not circular else new_n, device=weight.device)
    below, rest = k * n // new_n, k * n % new_n
    above = (below + 1) % count if circular else (below + 1).clamp(max=count - 1)
    share = (rest.to(torch.promote_types(weight.dtype, torch.float32)) / new_n).to(weight.dtype)
    share = share.reshape([-1 if other == axis else 1 for other in range(weight.dim())])
    return torch.lerp(weight.index_select(axis, below), weight.index_select(axis, above), share)


def _lengths(name: str, grid: object) -> int | tuple[int, int]:
    if sequence_of(grid) is not None:
        return check_new_grid(name, grid)
    return check_integer(name, grid, minimum=1, maximum=LARGEST_SIZE)


def _like(name: str, grid: int | tuple[int, int], other: int | tuple[int, int]) -> int | tuple[int, int]:
    """Return ``grid`` if it is of the kind of ``other``, which it takes the place of."""
    if isinstance(grid, tuple) != isinstance(other, tuple):
        kind = "(height, width)" if isinstance(other, tuple) else "a number of tokens"
        raise ValueError(f"{name}: expected {kind} like the grid {other}, got {grid!r}")
    return grid


def _axes(grid: int | tuple[int, int]) -> tuple[int, ...]:
    return grid if isinstance(grid, tuple) else (grid,)


def _pair(grid: int | tuple[int, int]) -> tuple[int, int] | None:
    return grid if isinstance(grid, tuple) else None


def _weight_shape(grid: int | tuple[int, int], basis: str, dim: int) -> list[int]:
    tokens = grid if isinstance(grid, int) else grid[0] * grid[1]
    return [*spectrum_shape(_pair(grid) or (tokens,), basis), dim, *([2] if basis == "rfft" else [])]
