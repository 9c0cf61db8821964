"""FLOPs of every operator, for ``torch.utils.flop_counter.FlopCounterMode``.

Counted is the arithmetic that a kernel does on tokens, a multiply-add as 2:

* A transform is a dense matrix per axis, ``[W', W]`` over the rows of a grid and ``[H', H]`` over its columns, complex
  for the Fourier transform over columns (8 flops for a complex multiply-add). Kernels fold even and odd parts, which
  halves the products of long lines; it is not subtracted. Axes of more than 1,024 points are transformed by
  ``torch.fft``, for which PyTorch has no formula: they count 0.
* Similarities are a dense product of all pairs, masked ones too. The gradient of `token_logits` is sparse and is
  counted so: one row of D multiply-adds for every token of either side, with every sample of the other.
* Weighted sums count 2 for each element that enters, sums and products alone 1; in the cross-entropy each of
  subtraction, exponential, addition and multiplication counts 1 for every logit.

Weights of coefficients, norms of vectors, copies and choices are left out, as PyTorch leaves out what is elementwise.

PyTorch's module is imported by whoever counts; formulas are registered then, so that they cost nothing before.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]


def _axes(tokens: int, grid: Shape | None, prefix_tokens: int) -> tuple[int, int]:
    return (grid[0], grid[1]) if grid else (1, tokens - prefix_tokens)


def _cosine(height: int, width: int, grid: Shape | None) -> int:
    """A DCT over the rows, and over the columns of a grid, for each sample and channel."""
    return 2 * height * width * (width + (height if grid else 0))


def _fourier(height: int, width: int, grid: Shape | None) -> int:
    """A real FFT over the rows, and a complex one over the columns; its inverse costs the same."""
    bins = width // 2 + 1
    return 2 * height * width * 2 * bins + (8 * bins * height * height if grid else 0)


def _in_basis(basis: str, height: int, width: int, grid: Shape | None) -> int:
    return (_cosine if basis == "dct" else _fourier)(height, width, grid)


def _sums(basis: str, height: int, width: int) -> int:
    """A product with each coefficient, added up: of two real or of two complex numbers."""
    return 2 * height * width if basis == "dct" else 8 * height * (width // 2 + 1)


def _dct(x: Shape, type: int, grid: Shape | None, norm: str, prefix_tokens: int, *_: Any) -> int:
    return x[0] * x[2] * _cosine(*_axes(x[1], grid, prefix_tokens), grid)


def _rfft(x: Shape, grid: Shape | None, norm: str, prefix_tokens: int, *_: Any) -> int:
    return x[0] * x[2] * _fourier(*_axes(x[1], grid, prefix_tokens), grid)


def _rfft_adjoint(real: Shape, imag: Shape, tokens: int, grid: Shape | None, norm: str, prefix_tokens: int) -> int:
    return real[0] * real[-1] * _fourier(*_axes(tokens, grid, prefix_tokens), grid)


def _irfft(real: Shape, imag: Shape, n: int, grid: Shape | None, *_: Any) -> int:
    return real[0] * real[-1] * _fourier(*_axes(n, grid, 0), grid)


def _irfft_adjoint(x: Shape, n: int, grid: Shape | None, norm: str) -> int:
    return x[0] * x[2] * _fourier(*_axes(n, grid, 0), grid)


def _spectral_resize(
    x: Shape, grid: Shape, new_grid: Shape, rescale: bool, prefix_tokens: int, transposed: bool, *_: Any
) -> int:
    (height, width), (new_height, new_width) = (new_grid, grid) if transposed else (grid, new_grid)
    return 2 * x[0] * x[2] * (height * width * new_width + height * new_width * new_height)


def _spectral_filter(x: Shape, weight: Shape, grid: Shape | None, basis: str, prefix_tokens: int, *_: Any) -> int:
    return 2 * x[0] * x[2] * _in_basis(basis, *_axes(x[1], grid, prefix_tokens), grid)


def _spectral_filter_backward_weight(grad: Shape, x: Shape, grid: Shape | None, basis: str, prefix_tokens: int) -> int:
    axes = _axes(x[1], grid, prefix_tokens)
    return x[0] * x[2] * (2 * _in_basis(basis, *axes, grid) + _sums(basis, *axes))


def _band_energy(x: Shape, bands: Shape | None, grid: Shape | None, basis: str, prefix_tokens: int, count: int) -> int:
    height, width = _axes(x[1], grid, prefix_tokens)
    squares = 2 * height * width if basis == "dct" else 4 * height * (width // 2 + 1)
    return x[0] * x[2] * (_in_basis(basis, height, width, grid) + squares)


def _band_energy_backward(
    grad: Shape, x: Shape, bands: Shape | None, grid: Shape | None, basis: str, prefix_tokens: int
) -> int:
    return 2 * x[0] * x[2] * _in_basis(basis, *_axes(x[1], grid, prefix_tokens), grid)


def _token_energy(x: Shape, cutoff: float, grid: Shape | None, basis: str, prefix_tokens: int) -> int:
    height, width = _axes(x[1], grid, prefix_tokens)
    return 2 * x[0] * x[2] * (_in_basis(basis, height, width, grid) + height * width)


def _token_energy_backward(
    grad: Shape, x: Shape, cutoff: float, grid: Shape | None, basis: str, prefix_tokens: int
) -> int:
    return 4 * x[0] * x[2] * _in_basis(basis, *_axes(x[1], grid, prefix_tokens), grid)


def _amplitude_phase(x: Shape, grid: Shape | None, eps: float, prefix_tokens: int) -> int:
    return _rfft(x, grid, "ortho", prefix_tokens)


def _match(metric: Shape, r: int, guide: Shape | None, guide_weight: float, prefix_tokens: int, *_: Any) -> int:
    batch, tokens, channels = metric
    sources = len(range(prefix_tokens + prefix_tokens % 2, tokens, 2))
    return 2 * batch * channels * sources * (tokens - prefix_tokens - sources)


def _merge(x: Shape, *_: Any) -> int:
    return 2 * x[0] * x[1] * x[2]


def _combine(x: Shape, weight: Shape | None, assignment: Shape, kept: Shape, removed: Shape, *_: Any) -> int:
    return x[0] * x[2] * (removed[1] if weight is None else 2 * x[1])


def _spread(y: Shape, weight: Shape | None, assignment: Shape, *_: Any) -> int:
    return 0 if weight is None else assignment[0] * assignment[1] * y[2]


def _weighted_mean(x: Shape, weight: Shape | None, prefix_tokens: int) -> int:
    return (1 if weight is None else 2) * x[0] * (x[1] - prefix_tokens) * x[2]


def _weighted_mean_backward(grad: Shape, weight: Shape | None, total: Shape, tokens: int, prefix_tokens: int) -> int:
    return grad[0] * (tokens - prefix_tokens) * grad[1]


def _weighted_mean_backward_weight(grad: Shape, x: Shape, weight: Shape, total: Shape, prefix_tokens: int) -> int:
    return 2 * x[0] * (x[1] - prefix_tokens) * x[2]


def _token_logits(image_tokens: Shape, text_tokens: Shape, *_: Any) -> int:
    (batch, images, channels), (text_batch, texts) = image_tokens, text_tokens[:2]
    return 2 * batch * text_batch * (images * texts * channels + images + texts)


def _token_logits_backward(
    grad_per_image: Shape | None, grad_per_text: Shape | None, image_tokens: Shape, text_tokens: Shape, *rest: Any
) -> int:
    (batch, images, channels), (text_batch, texts, _) = image_tokens, text_tokens
    return 2 * sum(rest[-1][:2]) * batch * text_batch * (images + texts) * channels


def _pair_cross_entropy(logits: Shape, labels: Shape | None, directions: str, *_: Any) -> int:
    return (6 if directions == "both" else 3) * logits[0] * logits[1]


def _pair_cross_entropy_backward(
    grad: Shape, logits: Shape, labels: Shape, row_terms: Shape, column_terms: Shape, both: bool, *_: Any
) -> int:
    return (7 if both else 3) * logits[0] * logits[1]


FORMULAS: dict[str, Callable[..., int]] = {
    "dct": _dct,
    "dct_out": _dct,
    "idct": _dct,
    "idct_out": _dct,
    "rfft": _rfft,
    "rfft_out": _rfft,
    "rfft_adjoint": _rfft_adjoint,
    "irfft": _irfft,
    "irfft_out": _irfft,
    "irfft_adjoint": _irfft_adjoint,
    "spectral_filter": _spectral_filter,
    "spectral_filter_out": _spectral_filter,
    "spectral_filter_backward_weight": _spectral_filter_backward_weight,
    "spectral_resize": _spectral_resize,
    "spectral_resize_out": _spectral_resize,
    "band_energy": _band_energy,
    "band_energy_backward": _band_energy_backward,
    "token_energy": _token_energy,
    "token_energy_backward": _token_energy_backward,
    "amplitude_phase": _amplitude_phase,
    "merging_match": _match,
    "merging_match_capped": _match,
    "merging_match_above": _match,
    "merging_merge": _merge,
    "merging_combine": _combine,
    "merging_spread": _spread,
    "merging_weighted_mean": _weighted_mean,
    "merging_weighted_mean_backward": _weighted_mean_backward,
    "merging_weighted_mean_backward_weight": _weighted_mean_backward_weight,
    "token_logits": _token_logits,
    "token_logits_backward": _token_logits_backward,
    "pair_cross_entropy": _pair_cross_entropy,
    "contrastive_pair_cross_entropy_backward": _pair_cross_entropy_backward,
}
"""Operator -> its formula, which takes the operator's arguments with the shapes of tensors in their place."""


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        operator = getattr(torch.ops.mlip_kernels, name)

        def count(*arguments: Any, out_shape: Any = None, formula: Callable[..., int] = formula, **named: Any) -> int:
            return formula(*arguments, **named)

        counter.flop_registry.pop(operator, None)
        counter.register_flop_formula(operator)(count)


class _AfterImport(MetaPathFinder):
    """Adds the formulas to PyTorch's module of FLOP counting as soon as somebody imports it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        loader.exec_module = execute_and_register
        return spec


def register_when_imported() -> None:
    """Register the formulas, now or as soon as PyTorch's module of FLOP counting is imported."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _AfterImport())
