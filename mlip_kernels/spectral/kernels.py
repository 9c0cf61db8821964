"""The kernels of the family: linear maps along the axes of a grid, given as matrices, with weights between them.

`mlip_kernels.spectral.plain` says what each of them computes. The operators of the family look their matrices up and
call these; gradients are theirs, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mlip_kernels._library import define_kernel, define_out
from mlip_kernels.spectral import plain

_MATRICES = "Tensor? matrix_h, Tensor matrix_w, SymInt height, SymInt width, SymInt prefix_tokens"
_TRITON = "mlip_kernels.triton.spectral"

separable = define_kernel(
    f"spectral_separable(Tensor x, {_MATRICES}) -> Tensor",
    reference=plain.separable,
    triton=f"{_TRITON}.transforms:separable",
)
analysis = define_kernel(
    f"spectral_analysis(Tensor x, {_MATRICES}) -> (Tensor real, Tensor imaginary)",
    reference=plain.analysis,
    triton=f"{_TRITON}.transforms:analysis",
)
synthesis = define_kernel(
    "spectral_synthesis(Tensor real, Tensor imaginary, Tensor? matrix_h, Tensor matrix_w, SymInt prefix_tokens)"
    " -> Tensor",
    reference=plain.synthesis,
    triton=f"{_TRITON}.transforms:synthesis",
)
filtered = define_kernel(
    f"spectral_filtered(Tensor x, Tensor weight, {_MATRICES}) -> Tensor",
    reference=plain.filtered,
    triton=f"{_TRITON}.filter:filtered",
)
filtered_backward_weight = define_kernel(
    f"spectral_filtered_backward_weight(Tensor grad, Tensor x, {_MATRICES}, bool fourier) -> Tensor",
    reference=plain.filtered_backward_weight,
    triton=f"{_TRITON}.filter:filtered_backward_weight",
)
band_energy = define_kernel(
    f"spectral_band_energy(Tensor x, Tensor bands, SymInt count, {_MATRICES}, bool fourier) -> Tensor",
    reference=plain.band_energy,
    triton=f"{_TRITON}.energy:band_energy",
)
band_energy_backward = define_kernel(
    f"spectral_band_energy_backward(Tensor grad, Tensor x, Tensor bands, {_MATRICES}, bool fourier) -> Tensor",
    reference=plain.band_energy_backward,
    triton=f"{_TRITON}.energy:band_energy_backward",
)
token_energy = define_kernel(
    f"spectral_token_energy(Tensor x, Tensor frequency_mask, {_MATRICES}) -> Tensor",
    reference=plain.token_energy,
    triton=f"{_TRITON}.energy:token_energy",
)
token_energy_backward = define_kernel(
    f"spectral_token_energy_backward(Tensor grad, Tensor x, Tensor frequency_mask, {_MATRICES}) -> Tensor",
    reference=plain.token_energy_backward,
    triton=f"{_TRITON}.energy:token_energy_backward",
)

separable_out = define_out("spectral_separable", "out")
analysis_out = define_out("spectral_analysis", "out_real", "out_imaginary")
synthesis_out = define_out("spectral_synthesis", "out")
filtered_out = define_out("spectral_filtered", "out")


def into(kernel: Callable[..., None], *out: Tensor) -> Callable[..., Any]:
    """The kernel with ``out`` as its last arguments: what takes the place of the one that returns its results."""

    def write(*arguments: Any) -> None:
        kernel(*arguments, *out)

    return write
