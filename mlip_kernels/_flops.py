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


def _separable(x: Shape, along_h: Shape | None, along_w: Shape, height: int, width: int, *_: Any) -> int:
    columns = 0 if along_h is None else along_w[0] * along_h[0] * height
    return 2 * x[0] * x[2] * (height * width * along_w[0] + columns)


def _analysis(x: Shape, along_h: Shape | None, along_w: Shape, height: int, width: int, *_: Any) -> int:
    kept = along_w[0] // 2
    columns = 0 if along_h is None else 8 * kept * along_h[1] * height
    return x[0] * x[2] * (2 * height * width * 2 * kept + columns)


def _synthesis(real: Shape, imaginary: Shape, along_h: Shape | None, along_w: Shape, *_: Any) -> int:
    batch, height, kept, channels = real
    rows = height if along_h is None else along_h[1]
    columns = 0 if along_h is None else 8 * kept * rows * height
    return batch * channels * (columns + 2 * rows * 2 * kept * along_w[0])


def _there(x: Shape, along_h: Shape | None, along_w: Shape, height: int, width: int, fourier: bool) -> int:
    """A transform of all tokens; back again costs the same."""
    return (_analysis if fourier else _separable)(x, along_h, along_w, height, width)


def _coefficients(height: int, width: int, fourier: bool) -> int:
    return height * (width // 2 + 1 if fourier else width)


def _filtered(x: Shape, weight: Shape, along_h: Shape | None, along_w: Shape, height: int, width: int, *_: Any) -> int:
    return 2 * _there(x, along_h, along_w, height, width, len(weight) == 4)


def _filtered_backward_weight(
    grad: Shape, x: Shape, along_h: Shape | None, along_w: Shape, height: int, width: int, prefix: int, fourier: bool
) -> int:
    sums = _coefficients(height, width, fourier) * (8 if fourier else 2)
    return 2 * _there(x, along_h, along_w, height, width, fourier) + sums * x[0] * x[2]


def _band_energy(
    x: Shape,
    bands: Shape,
    count: int,
    along_h: Shape | None,
    along_w: Shape,
    height: int,
    width: int,
    prefix: int,
    fourier: bool,
    *_: Any,
) -> int:
    squares = _coefficients(height, width, fourier) * (4 if fourier else 2)
    return _there(x, along_h, along_w, height, width, fourier) + squares * x[0] * x[2]


def _band_energy_backward(
    grad: Shape,
    x: Shape,
    bands: Shape,
    along_h: Shape | None,
    along_w: Shape,
    height: int,
    width: int,
    prefix: int,
    fourier: bool,
) -> int:
    return 2 * _there(x, along_h, along_w, height, width, fourier)


def _token_energy(
    x: Shape, kept: Shape, along_h: Shape | None, along_w: Shape, height: int, width: int, *_: Any
) -> int:
    there = _there(x, along_h, along_w, height, width, len(kept) == 3)
    return 2 * there + 2 * x[0] * height * width * x[2]


def _token_energy_backward(
    grad: Shape, x: Shape, kept: Shape, along_h: Shape | None, along_w: Shape, height: int, width: int, *_: Any
) -> int:
    return 4 * _there(x, along_h, along_w, height, width, len(kept) == 3)


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


def _token_maxima(image_tokens: Shape, text_tokens: Shape, *_: Any) -> int:
    (batch, images, channels), (text_batch, texts) = image_tokens, text_tokens[:2]
    return 2 * batch * text_batch * (images * texts * channels + images + texts)


def _token_maxima_backward(
    grad_mean: Shape,
    grad_other_mean: Shape,
    other_tokens: Shape,
    mask: Shape | None,
    other_mask: Shape | None,
    share: Shape,
    *_: Any,
) -> int:
    other_batch, others, channels = other_tokens
    return 2 * share[0] * other_batch * (share[1] + others) * channels


def _pair_cross_entropy(logits: Shape, labels: Shape, both: bool, *_: Any) -> int:
    return (6 if both else 3) * logits[0] * logits[1]


def _pair_cross_entropy_backward(
    grad: Shape, logits: Shape, labels: Shape, row_terms: Shape, column_terms: Shape, both: bool, *_: Any
) -> int:
    return (7 if both else 3) * logits[0] * logits[1]


FORMULAS: dict[str, Callable[..., int]] = {
    "spectral_separable": _separable,
    "spectral_analysis": _analysis,
    "spectral_synthesis": _synthesis,
    "spectral_filtered": _filtered,
    "spectral_separable_out": _separable,
    "spectral_analysis_out": _analysis,
    "spectral_synthesis_out": _synthesis,
    "spectral_filtered_out": _filtered,
    "spectral_filtered_backward_weight": _filtered_backward_weight,
    "spectral_band_energy": _band_energy,
    "spectral_band_energy_backward": _band_energy_backward,
    "spectral_token_energy": _token_energy,
    "spectral_token_energy_backward": _token_energy_backward,
    "merging_match": _match,
    "merging_match_capped": _match,
    "merging_match_above": _match,
    "merging_merge": _merge,
    "merging_combine": _combine,
    "merging_spread": _spread,
    "merging_weighted_mean": _weighted_mean,
    "merging_weighted_mean_backward": _weighted_mean_backward,
    "merging_weighted_mean_backward_weight": _weighted_mean_backward_weight,
    "contrastive_token_maxima": _token_maxima,
    "contrastive_token_maxima_backward": _token_maxima_backward,
    "contrastive_pair_cross_entropy": _pair_cross_entropy,
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
