"""What ``apply`` of the classes in `mlip_kernels.functions` refuses, and what it takes for what is left out."""

import pytest
import torch

import mlip_kernels as mk
from mlip_kernels import functions
from mlip_kernels.testing import assert_identical


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, TEXTS, LOGITS = random(2, 17, 6), random(3, 5, 6, seed=1), random(6, 6, seed=2)
FILTER, WEIGHT = random(4, 3, 6, 2, seed=5), random(2, 17, seed=6).abs()
PLAN = mk.merge_plan(X, 3)


def results_and_gradients(call, leaves):
    results = call(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    differentiable = [result for result in results if result.requires_grad]
    ones = [torch.ones_like(result) for result in differentiable]
    return *results, *torch.autograd.grad(differentiable, leaves, ones)


def all_identical(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert_identical(one, other)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("DCT", (X, 5), "^type: "),
        ("RFFT", (X, (3, 5)), "^grid: "),
        ("SpectralFilter", (X, FILTER), "^weight: "),
        ("BandEnergy", (X, 0), "^bands: "),
        ("MergeTokens", (X[:, 1:], None, *PLAN.maps), "^x: "),
        ("UnmergeTokens", (X, *PLAN.maps), "^y: "),
        ("WeightedMean", (X, WEIGHT[:, 1:]), "^weight: "),
        ("TokenLogits", (X, TEXTS, WEIGHT), "^image_mask: "),
        ("PairCrossEntropy", (X[0],), "^logits: "),
        ("MatchTokens", (X, -1), "^r: "),
    ],
)
def test_apply_names_a_wrong_argument(name, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(functions, name).apply(*arguments)


def test_arguments_that_are_left_out_have_the_public_defaults():
    assert_identical(functions.DCT.apply(X), mk.dct(X))
    assert_identical(functions.WeightedMean.apply(X), mk.weighted_mean(X))
    all_identical(functions.TokenLogits.apply(X, TEXTS), mk.token_logits(X, TEXTS))
    torch._dynamo.reset()
    compiled = torch.compile(functions.TokenLogits.apply, fullgraph=True, backend="aot_eager")
    leaf = X.clone().requires_grad_()
    all_identical(
        results_and_gradients(lambda x: compiled(x, TEXTS), [leaf]),
        results_and_gradients(lambda x: mk.token_logits(x, TEXTS), [leaf]),
    )
