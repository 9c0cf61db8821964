"""Fused kernels for training CLIP-like models faster: spectral features, token merging, token-level contrast.

The packages `nn`, `models` and `patch` and the modules `functions` and `testing` are imported when they are first used,
as attributes too: ``import mlip_kernels as mk; mk.nn.ClipLoss()``. ``mk.visualize`` draws what merged in an image.
"""

__version__ = "0.1.0"
__all__ = [
    "MergePlan",
    "amplitude_phase",
    "band_energy",
    "dct",
    "idct",
    "irfft",
    "keep_rate_schedule",
    "merge_layers",
    "merge_plan",
    "merge_schedule",
    "merge_tokens",
    "pair_cross_entropy",
    "proportional_attention",
    "rfft",
    "spectral_filter",
    "spectral_resize",
    "token_counts",
    "token_energy",
    "token_logits",
    "use_reference",
    "weighted_mean",
]

from mlip_kernels import _variables

try:
    import torch as _torch  # noqa: F401

    _variables.check(_variables.AT_RUN_TIME)
except (ImportError, OSError, ValueError) as _failure:  # `python -m mlip_kernels.env` is to say what is wrong
    _reason: Exception | None = _failure
else:
    _reason = None
    from mlip_kernels import _flops
    from mlip_kernels._operator import use_reference
    from mlip_kernels.contrastive import pair_cross_entropy, token_logits
    from mlip_kernels.merging import (
        MergePlan,
        keep_rate_schedule,
        merge_layers,
        merge_plan,
        merge_schedule,
        merge_tokens,
        proportional_attention,
        token_counts,
        weighted_mean,
    )
    from mlip_kernels.spectral import (
        amplitude_phase,
        band_energy,
        dct,
        idct,
        irfft,
        rfft,
        spectral_filter,
        spectral_resize,
        token_energy,
    )

    _flops.register_when_imported()

_LAZY = ("functions", "models", "nn", "patch", "testing")


def __getattr__(name: str) -> object:
    if name in _LAZY or name == "visualize":
        import importlib

        if name == "visualize":
            return importlib.import_module(f"{__name__}.visualization").visualize
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__ and _reason is not None:
        raise ImportError(f"mlip_kernels.{name} is not available: {_reason}") from _reason
    message = f"module 'mlip_kernels' has no attribute {name!r}"
    if not name.startswith("_"):
        import difflib

        if near := difflib.get_close_matches(name, (*__all__, *_LAZY, "visualize"), n=1):
            message += f"; did you mean {near[0]!r}?"
    raise AttributeError(message, name=name)  # named, so that Python does not append a second suggestion


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "visualize"})
