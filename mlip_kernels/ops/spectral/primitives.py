"""The primitives of the spectral family as registered operators, and their gradients.

A linear map is its own gradient, with the transposed matrices, so those can be differentiated any number of times. The
energies are quadratic; their gradients recompute the spectrum and refuse a second derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mlip_kernels._library import define, define_out, differentiate, plain_needed
from mlip_kernels.reference.spectral import primitives as reference
from mlip_kernels.reference.spectral.primitives import PLAIN, Primitives, adjoint

_MATRICES = "Tensor? along_h, Tensor along_w, SymInt height, SymInt width, SymInt prefix_tokens"


def primitives(*out: Tensor) -> Primitives:
    """The registered operators, or plain PyTorch where it was asked for or where it alone can be transformed.

    With ``out``, separable, analysis, synthesis and filtered write their results there and return these tensors.
    """
    found = PLAIN if plain_needed() else REGISTERED
    if not out:
        return found
    writing = [_copying(operator, out) for operator in PLAIN[:4]] if found is PLAIN else [_into(o, out) for o in INTO]
    return found._replace(**dict(zip(Primitives._fields, writing, strict=False)))


def _into(operator: Callable[..., None], out: tuple[Tensor, ...]) -> Callable[..., Any]:
    def write(*arguments: Any) -> Any:
        operator(*arguments, *out)
        return out if len(out) > 1 else out[0]

    return write


def _copying(operator: Callable[..., Any], out: tuple[Tensor, ...]) -> Callable[..., Any]:
    def write(*arguments: Any) -> Any:
        result = operator(*arguments)
        return tuple(map(Tensor.copy_, out, result)) if len(out) > 1 else out[0].copy_(result)

    return write


def _transposed(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.t()


def _rows(along_h: Tensor | None, height: int, axis: int = 0) -> int:
    return height if along_h is None else along_h.shape[axis]


# --- separable -------------------------------------------------------------------------------------------------------


def _fake_separable(
    x: Tensor, along_h: Tensor | None, along_w: Tensor, height: int, width: int, prefix_tokens: int
) -> Tensor:
    return x.new_empty(x.shape[0], prefix_tokens + _rows(along_h, height) * along_w.shape[0], x.shape[2])


_separable = define(
    f"spectral_separable(Tensor x, {_MATRICES}) -> Tensor",
    reference=reference.separable,
    fake=_fake_separable,
    triton="mlip_kernels.triton.spectral.separable:separable",
)


def _save_separable(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, along_h, along_w, height, _, ctx.prefix_tokens = inputs
    ctx.save_for_backward(along_h, along_w)
    ctx.height, ctx.width = _rows(along_h, height), along_w.shape[0]


def _separable_gradients(ctx: Any, grad: Tensor) -> tuple:
    along_h, along_w = ctx.saved_tensors
    grad_x = _separable(grad, _transposed(along_h), along_w.t(), ctx.height, ctx.width, ctx.prefix_tokens)
    return grad_x, None, None, None, None, None


differentiate("spectral_separable", setup_context=_save_separable, backward=_separable_gradients, through=())

# --- analysis and synthesis ------------------------------------------------------------------------------------------


def _fake_analysis(
    x: Tensor, along_h: Tensor | None, along_w: Tensor, height: int, width: int, prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], _rows(along_h, height, 1), along_w.shape[0] // 2, x.shape[2])
    return x.new_empty(shape), x.new_empty(shape)


def _fake_synthesis(
    real: Tensor, imaginary: Tensor, along_h: Tensor | None, along_w: Tensor, prefix_tokens: int
) -> Tensor:
    batch, height, _, channels = real.shape
    return real.new_empty(batch, prefix_tokens + _rows(along_h, height, 1) * along_w.shape[0], channels)


_analysis = define(
    f"spectral_analysis(Tensor x, {_MATRICES}) -> (Tensor real, Tensor imaginary)",
    reference=reference.analysis,
    fake=_fake_analysis,
    triton="mlip_kernels.triton.spectral.analysis:analysis",
)
_synthesis = define(
    "spectral_synthesis(Tensor real, Tensor imaginary, Tensor? along_h, Tensor along_w, SymInt prefix_tokens)"
    " -> Tensor",
    reference=reference.synthesis,
    fake=_fake_synthesis,
    triton="mlip_kernels.triton.spectral.synthesis:synthesis",
)


def _save_analysis(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, along_h, along_w, _, _, ctx.prefix_tokens = inputs
    ctx.save_for_backward(along_h, along_w)


def _analysis_gradients(ctx: Any, grad_real: Tensor, grad_imaginary: Tensor) -> tuple:
    along_h, along_w = ctx.saved_tensors
    grad_x = _synthesis(grad_real, grad_imaginary, adjoint(along_h), along_w.t(), ctx.prefix_tokens)
    return grad_x, None, None, None, None, None


def _save_synthesis(ctx: Any, inputs: tuple, output: Tensor) -> None:
    real, _, along_h, along_w, ctx.prefix_tokens = inputs
    ctx.save_for_backward(along_h, along_w)
    ctx.height, ctx.width = _rows(along_h, real.shape[1], 1), along_w.shape[0]


def _synthesis_gradients(ctx: Any, grad: Tensor) -> tuple:
    along_h, along_w = ctx.saved_tensors
    spectrum = _analysis(grad, adjoint(along_h), along_w.t(), ctx.height, ctx.width, ctx.prefix_tokens)
    return *spectrum, None, None, None


differentiate("spectral_analysis", setup_context=_save_analysis, backward=_analysis_gradients, through=())
differentiate("spectral_synthesis", setup_context=_save_synthesis, backward=_synthesis_gradients, through=())

# --- filter ----------------------------------------------------------------------------------------------------------


def _fake_filtered(
    x: Tensor, weight: Tensor, along_h: Tensor | None, along_w: Tensor, height: int, width: int, prefix_tokens: int
) -> Tensor:
    return x.new_empty(x.shape)


def _fake_filtered_backward_weight(
    grad: Tensor,
    x: Tensor,
    along_h: Tensor | None,
    along_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
    fourier: bool,
) -> Tensor:
    shape = (height, width // 2 + 1, x.shape[2], 2) if fourier else (height, width, x.shape[2])
    return along_w.new_empty(shape)


_filtered = define(
    f"spectral_filtered(Tensor x, Tensor weight, {_MATRICES}) -> Tensor",
    reference=reference.filtered,
    fake=_fake_filtered,
    triton="mlip_kernels.triton.spectral.filtered:filtered",
)
_filtered_backward_weight = define(
    f"spectral_filtered_backward_weight(Tensor grad, Tensor x, {_MATRICES}, bool fourier) -> Tensor",
    reference=reference.filtered_backward_weight,
    fake=_fake_filtered_backward_weight,
    triton="mlip_kernels.triton.spectral.filtered_backward_weight:filtered_backward_weight",
)


def _conjugate(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 3 else weight * weight.new_tensor((1.0, -1.0))


def _save_filtered(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, along_h, along_w, *ctx.sizes = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.fourier = weight.dim() == 4
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, along_h, along_w)


def _filtered_gradients(ctx: Any, grad: Tensor) -> tuple:
    x, weight, along_h, along_w = ctx.saved_tensors
    matrices = (along_h, along_w, *ctx.sizes)
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = _filtered(grad, _conjugate(weight), *matrices)
    if ctx.needs_input_grad[1]:
        grad_weight = _filtered_backward_weight(grad, x, *matrices, ctx.fourier)
    return grad_x, grad_weight, None, None, None, None, None


def _save_filtered_backward_weight(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad, x, along_h, along_w, *ctx.sizes, _ = inputs
    ctx.save_for_backward(grad, x, along_h, along_w)


def _filtered_backward_weight_gradients(ctx: Any, grad_weight: Tensor) -> tuple:
    """The gradient of the weight is linear in either argument: ``<g, filtered(x, V)> = <dW(g, x), V>`` for every V."""
    grad, x, along_h, along_w = ctx.saved_tensors
    height, width, prefix_tokens = ctx.sizes

    def filtered(tokens: Tensor, weight: Tensor) -> Tensor:
        result = _filtered(tokens[:, prefix_tokens:], weight, along_h, along_w, height, width, 0)
        return F.pad(result, (0, 0, prefix_tokens, 0))

    grad_grad = filtered(x, grad_weight) if ctx.needs_input_grad[0] else None
    grad_x = filtered(grad, _conjugate(grad_weight)) if ctx.needs_input_grad[1] else None
    return grad_grad, grad_x, None, None, None, None, None, None


differentiate("spectral_filtered", setup_context=_save_filtered, backward=_filtered_gradients, through=())
differentiate(
    "spectral_filtered_backward_weight",
    setup_context=_save_filtered_backward_weight,
    backward=_filtered_backward_weight_gradients,
    through=(),
)

# --- energies --------------------------------------------------------------------------------------------------------


def _fake_band_energy(
    x: Tensor,
    bands: Tensor,
    count: int,
    along_h: Tensor | None,
    along_w: Tensor,
    height: int,
    width: int,
    prefix_tokens: int,
    fourier: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], count, x.shape[2])


def _fake_band_energy_backward(grad: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_token_energy(x: Tensor, kept: Tensor, *arguments: Any) -> Tensor:
    return kept.new_empty(x.shape[:2])


def _fake_token_energy_backward(grad: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape)


_band_energy = define(
    f"spectral_band_energy(Tensor x, Tensor bands, SymInt count, {_MATRICES}, bool fourier) -> Tensor",
    reference=reference.band_energy,
    fake=_fake_band_energy,
    triton="mlip_kernels.triton.spectral.band_energy:band_energy",
)
_band_energy_backward = define(
    f"spectral_band_energy_backward(Tensor grad, Tensor x, Tensor bands, {_MATRICES}, bool fourier) -> Tensor",
    reference=reference.band_energy_backward,
    fake=_fake_band_energy_backward,
    triton="mlip_kernels.triton.spectral.band_energy:band_energy_backward",
)
_token_energy = define(
    f"spectral_token_energy(Tensor x, Tensor kept, {_MATRICES}) -> Tensor",
    reference=reference.token_energy,
    fake=_fake_token_energy,
    triton="mlip_kernels.triton.spectral.token_energy:token_energy",
)
_token_energy_backward = define(
    f"spectral_token_energy_backward(Tensor grad, Tensor x, Tensor kept, {_MATRICES}) -> Tensor",
    reference=reference.token_energy_backward,
    fake=_fake_token_energy_backward,
    triton="mlip_kernels.triton.spectral.token_energy:token_energy_backward",
)


def _save_band_energy(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, bands, _, along_h, along_w, *ctx.sizes = inputs
    ctx.save_for_backward(x, bands, along_h, along_w)


def _band_energy_gradients(ctx: Any, grad: Tensor) -> tuple:
    x, bands, along_h, along_w = ctx.saved_tensors
    return _band_energy_backward(grad, x, bands, along_h, along_w, *ctx.sizes), *(None,) * 8


def _save_token_energy(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, kept, along_h, along_w, *ctx.sizes = inputs
    ctx.save_for_backward(x, kept, along_h, along_w)


def _token_energy_gradients(ctx: Any, grad: Tensor) -> tuple:
    x, kept, along_h, along_w = ctx.saved_tensors
    return _token_energy_backward(grad, x, kept, along_h, along_w, *ctx.sizes), *(None,) * 6


differentiate(
    "spectral_band_energy",
    setup_context=_save_band_energy,
    backward=_band_energy_gradients,
    through=("spectral_band_energy_backward",),
)
differentiate(
    "spectral_token_energy",
    setup_context=_save_token_energy,
    backward=_token_energy_gradients,
    through=("spectral_token_energy_backward",),
)

REGISTERED = Primitives(_separable, _analysis, _synthesis, _filtered, _band_energy, _token_energy)
INTO = (
    define_out("spectral_separable", "out"),
    define_out("spectral_analysis", "out_real", "out_imaginary"),
    define_out("spectral_synthesis", "out"),
    define_out("spectral_filtered", "out"),
)
"""The first four, with the results in the given tensors."""
