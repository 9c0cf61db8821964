"""Hold an operator of your own to the rule of this package: at most twice PyTorch's error, measured against float64.

    python examples/check_your_own_operator.py

`mlip_kernels.testing` has no tolerances to tune: the error that PyTorch makes in the same dtype is the measure. Shown
on two ways to compute a softmax-weighted mean, one of which sums in half precision.
"""

import torch
from torch import Tensor

from mlip_kernels import testing


def truth(x: Tensor, scores: Tensor) -> Tensor:
    """The definition; in float64 it is the truth, in other dtypes what PyTorch makes of it."""
    return torch.einsum("bn,bnd->bd", scores.softmax(1), x)


def careful(x: Tensor, scores: Tensor) -> Tensor:
    """Weights and sums in float32, rounded once."""
    return torch.einsum("bn,bnd->bd", scores.float().softmax(1), x.float()).to(x.dtype)


def careless(x: Tensor, scores: Tensor) -> Tensor:
    """A running sum in the dtype of x."""
    weights, total = scores.softmax(1), torch.zeros_like(x[:, 0])
    for token in range(x.shape[1]):
        total = total + weights[:, token, None] * x[:, token]
    return total


def main() -> None:
    torch.manual_seed(0)
    for shape in testing.TOKEN_SHAPES:  # awkward sizes: single elements, primes, an empty batch
        assert careful(torch.randn(shape), torch.randn(shape[:2])).shape == (shape[0], shape[2])
    x, scores = torch.randn(4, 197, 48), torch.randn(4, 197)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype), scores.to(dtype)
        right, baseline = truth(half[0].double(), half[1].double()), truth(*half)
        for operator in (careful, careless):
            result = operator(*half)
            ratio = testing.error(result, right) / testing.error(baseline, right)
            try:
                testing.assert_as_accurate(result, baseline, right)
            except AssertionError:
                verdict = "refused"
            else:
                verdict = "accepted"
            print(f"{dtype}: {operator.__name__:8} is {ratio:4.1f} times as wrong as PyTorch, {verdict}")


if __name__ == "__main__":
    main()
