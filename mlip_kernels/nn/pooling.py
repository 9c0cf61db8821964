"""Pooling of tokens to one embedding per image."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from mlip_kernels._arguments import (
    LARGEST_SIZE,
    autocast_enabled,
    check_integer,
    check_same_device,
    check_shape,
    check_tensor,
    check_tokens,
)


class AttentionPool(nn.Module):
    """Attention of one learned query over the tokens: ``softmax(x q / sqrt(D) + log weight) · x``.

    Unlike a mean over all tokens, which sees nothing but the zero frequency of a linear filter before it, it passes
    on every frequency. The query starts small, so that pooling starts close to the mean.

    Args:
        dim: channels D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = check_integer("dim", dim, minimum=1, maximum=LARGEST_SIZE)
        self.query = nn.Parameter(0.02 * torch.randn(self.dim))

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Pool tokens.

        Args:
            x: tokens ``[B, N, D]``; float32, bfloat16, float16 or float64.
            weight: ``[B, N]`` floating point, how many tokens each one counts for, such as the sizes of merged tokens;
                a token of weight 0 or less is left out.

        Returns:
            ``[B, D]`` in the dtype of x, computed in float32 or float64. Where no token has a positive weight it is 0
            and has no gradient.
        """
        check_tokens("x", x)
        check_shape("x", x, [*x.shape[:2], self.dim], "[B, N, D]")
        check_same_device("x", x, "the query", self.query)
        if weight is not None:
            check_shape("weight", check_tensor("weight", weight, layout="[B, N]"), x.shape[:2], "[B, N]")
            check_same_device("weight", weight, "x", x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        kind = x.device.type
        with torch.autocast(kind, enabled=False) if autocast_enabled(kind) else nullcontext():
            scores = wide @ (self.query.to(wide.dtype) * self.dim**-0.5)
            if weight is None:
                attention = scores.softmax(-1)
            else:
                weight = weight.to(wide.dtype)
                real = weight > 0
                any_real = real.any(-1, keepdim=True)
                log_weight = torch.where(real, weight, 1.0).log().masked_fill(~real & any_real, -torch.inf)
                attention = (scores + log_weight).softmax(-1) * any_real
            return (attention.unsqueeze(-2) @ wide).squeeze(-2).to(x.dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
