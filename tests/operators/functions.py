"""Rows of `mlip_kernels.functions`: ``<class>.apply``, with the samples of the public function of the same operator."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from mlip_kernels import functions
from operators.case import Operator
from operators.contrastive import CONTRASTIVE
from operators.merging import MERGING
from operators.spectral import SPECTRAL

PUBLIC = {operator.name: operator for operator in (*SPECTRAL, *MERGING, *CONTRASTIVE)}
ARGUMENTS = {
    "DCT": ("dct", "x", "type", "grid", "norm", "prefix_tokens"),
    "InverseDCT": ("idct", "x", "type", "grid", "norm", "prefix_tokens"),
    "RFFT": ("rfft", "x", "grid", "norm", "prefix_tokens"),
    "InverseRFFT": ("irfft", "real", "imag", "n", "grid", "norm"),
    "SpectralFilter": ("spectral_filter", "x", "weight", "grid", "basis", "norm", "prefix_tokens"),
    "BandEnergy": ("band_energy", "x", "bands", "grid", "basis", "prefix_tokens"),
    "TokenEnergy": ("token_energy", "x", "cutoff", "grid", "basis", "prefix_tokens"),
    "AmplitudePhase": ("amplitude_phase", "x", "grid", "eps", "prefix_tokens"),
    "SpectralResize": ("spectral_resize", "x", "grid", "new_grid", "rescale", "prefix_tokens"),
    "MatchTokens": ("merge_plan", "metric", "r", "guide", "guide_weight", "prefix_tokens", "mask"),
    "MergeTokens": ("MergePlan.merge", "x", "size", "self"),
    "UnmergeTokens": ("MergePlan.unmerge", "y", "self"),
    "WeightedMean": ("weighted_mean", "x", "weight", "prefix_tokens"),
    "TokenLogits": (
        "token_logits", "image_tokens", "text_tokens", "image_mask", "text_mask", "image_weight", "text_weight",
        "scale", "bias",
    ),
    "PairCrossEntropy": (
        "pair_cross_entropy", "logits", "labels", "directions", "label_smoothing", "reduction",
    ),
}  # fmt: skip
"""Class -> its public function, and the arguments of ``apply`` in order; of a plan (``self``) the maps."""


def applied(public: Operator, name: str, order: tuple[str, ...]) -> Operator:
    """The row of a class: every sample of the public function that ``apply`` can be given."""
    parameters = inspect.signature(public.function).parameters
    apply: Callable[..., Any] = getattr(functions, name).apply

    @functools.wraps(public.function)
    def function(**arguments: Any) -> Any:
        given: list[Any] = []
        for argument in order:
            value = arguments.get(argument, parameters[argument].default)
            given += value.maps if argument == "self" else [value]
        return apply(*given)

    def samples(dtype: Any) -> dict[str, Any]:
        every = public.samples(dtype)
        return {sample: arguments for sample, arguments in every.items() if set(arguments) <= set(order)}

    return dataclasses.replace(public, name=f"{name}.apply", function=function, samples=samples)


FUNCTIONS = [applied(PUBLIC[public], name, tuple(order)) for name, (public, *order) in ARGUMENTS.items()]


def public_of(operator: Operator) -> Operator:
    """The row of the public function of a class."""
    return PUBLIC[ARGUMENTS[operator.name.removesuffix(".apply")][0]]
