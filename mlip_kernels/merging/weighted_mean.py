"""Size-weighted mean over tokens: average pooling that stays right after tokens have been merged."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlip_kernels._arguments import check_prefix, check_same_device, check_shape, check_tensor, check_tokens
from mlip_kernels._operator import Operator, define_backward, needed
from mlip_kernels.merging import plain
from mlip_kernels.merging.plain import accumulation_dtype


def weighted_mean(x: Tensor, weight: Tensor | None = None, *, prefix_tokens: int = 0) -> Tensor:
    """Mean over tokens in which each token counts by its weight: ``y_b = sum_n w_bn x_bn / sum_n w_bn``.

    A merged token stands for as many patches as its size says; the plain mean would count it as one.

    Args:
        x: tokens ``[B, N, D]``; float32, bfloat16, float16 or float64. B may be 0.
        weight: ``[B, N]``, usually token sizes (patches per token, float32). Any floating dtype is accepted and taken
            to float32 (float64 if ``x`` is float64). ``None`` weighs every token 1.
        prefix_tokens: leading class or register tokens that take no part, whatever their weight.

    Returns:
        ``[B, D]`` in the dtype of ``x``, also under autocast: sums are kept in float32 (float64 for float64).

    Numerically hard input:
        * A token of weight 0 is left out whatever it holds: NaN or infinity in padding does no harm.
        * If the weights of a row sum to 0, its mean is 0 and so are all its gradients.
        * Negative weights are used as they are; the mean then may lie outside the range of the tokens, and weights
          that cancel to 0 fall under the rule above. Infinite weights give NaN.

    Gradients: ``dx_n = w_n g / W`` and ``dw_n = <g, x_n - y> / W``, 0 for prefix tokens. Saved for backward:
    ``weight``, the totals ``W`` (4 bytes per row), and ``x`` only if ``weight`` needs a gradient. The second
    derivative raises RuntimeError (`mlip_kernels.use_reference` computes it). Bitwise the same for any number of
    threads.

    Raises:
        TypeError: an argument is no tensor or has a wrong dtype.
        ValueError: a wrong shape or device, or ``prefix_tokens`` outside ``[0, N)``.

    Size-weighted averaging is that of Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3.
    """
    return _weighted_mean(x, weight, prefix_tokens)


class WeightedMean(Operator):
    """``WeightedMean.apply(x, weight=None, prefix_tokens=0)``: `weighted_mean`.

    Saved for backward: the weight, the totals, 4 bytes a row, and x if the weight needs a gradient.
    """

    schema = "merging_weighted_mean(Tensor x, Tensor? weight, int prefix_tokens) -> (Tensor mean, Tensor total)"
    triton = "mlip_kernels.triton.merging.weighted_mean:forward"
    results, differentiable = 1, 1
    compute = staticmethod(plain.weighted_mean_and_total)

    @staticmethod
    def check(x: Tensor, weight: Tensor | None = None, prefix_tokens: int = 0) -> tuple[Any, ...]:
        check_tokens("x", x)
        prefix_tokens = check_prefix(prefix_tokens, x.shape[1])
        if weight is not None:
            check_tensor("weight", weight, layout="[B, N]")
            check_shape("weight", weight, x.shape[:2], "[B, N]")
            check_same_device("weight", weight, "x", x)
            weight = weight.to(accumulation_dtype(x.dtype))
        return x, weight, prefix_tokens

    @staticmethod
    def fake(x: Tensor, weight: Tensor | None, prefix_tokens: int) -> tuple[Tensor, Tensor]:
        batch, _, channels = x.shape
        return x.new_empty(batch, channels), x.new_empty(batch, dtype=accumulation_dtype(x.dtype))

    @staticmethod
    def plain(x: Tensor, weight: Tensor | None, prefix_tokens: int) -> Tensor:
        return plain.weighted_mean(x, weight, prefix_tokens=prefix_tokens)

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, ctx.prefix_tokens = inputs
        ctx.tokens, total = x.shape[1], output[1]
        (needs_weight,) = needed(ctx, 1)
        ctx.save_for_backward(x if needs_weight else None, weight, total)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor | None, *rest: Any) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return None, None
        x, weight, total = ctx.saved_tensors
        grad_x = grad_weight = None
        needs_x, needs_weight = needed(ctx, 0, 1)
        if needs_x:
            grad_x = _backward(grad, weight, total, ctx.tokens, ctx.prefix_tokens)
        if needs_weight:
            grad_weight = _backward_weight(grad, x, weight, total, ctx.prefix_tokens)
        return grad_x, grad_weight


def _fake_backward(grad: Tensor, weight: Tensor | None, total: Tensor, tokens: int, prefix_tokens: int) -> Tensor:
    return grad.new_empty(grad.shape[0], tokens, grad.shape[1])


def _fake_backward_weight(grad: Tensor, x: Tensor, weight: Tensor, total: Tensor, prefix_tokens: int) -> Tensor:
    return total.new_empty(x.shape[:2])


_weighted_mean = WeightedMean.call
_backward = define_backward(
    "merging_weighted_mean_backward(Tensor grad, Tensor? weight, Tensor total, SymInt tokens, int prefix_tokens)"
    " -> Tensor grad_x",
    compute=plain.weighted_mean_backward,
    fake=_fake_backward,
    triton="mlip_kernels.triton.merging.weighted_mean:backward",
)
_backward_weight = define_backward(
    "merging_weighted_mean_backward_weight(Tensor grad, Tensor x, Tensor weight, Tensor total, int prefix_tokens)"
    " -> Tensor grad_weight",
    compute=plain.weighted_mean_backward_weight,
    fake=_fake_backward_weight,
    triton="mlip_kernels.triton.merging.weighted_mean:backward_weight",
)
