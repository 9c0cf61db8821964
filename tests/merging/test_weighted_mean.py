"""weighted_mean: the definition, its gradients, hard input, and the contract with torch's dispatcher and compiler."""

import os
import subprocess
import sys

import instruction_sets
import pytest
import torch

from mlip_kernels import use_reference, weighted_mean
from mlip_kernels.testing import (
    DTYPES,
    TOKEN_SHAPES,
    assert_as_accurate,
    assert_close,
    assert_identical,
    gradients,
    uninitialized_memory_is_nan,
)

OPERATORS = torch.ops.mlip_kernels
LONG_SHAPES = ((2, 600, 33), (1, 1025, 7))  # more tokens than one segment of the CPU kernel
WEIGHTS = ("none", "sizes", "fractions")


def tokens(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(shape, kind="sizes", seed=1):
    generator = torch.Generator().manual_seed(seed)
    if kind == "none":
        return None
    if kind == "fractions":
        return torch.rand(shape[:2], generator=generator)
    return torch.randint(0, 5, shape[:2], generator=generator).float()


def by_definition(x, weight, prefix_tokens):
    """The mean as two loops, in float64."""
    rows = []
    for b in range(x.shape[0]):
        total, weighted = 0.0, torch.zeros(x.shape[2], dtype=torch.float64)
        for n in range(prefix_tokens, x.shape[1]):
            w = 1.0 if weight is None else float(weight[b, n])
            total += w
            weighted += w * x[b, n].double()
        rows.append(weighted / total if total else torch.zeros_like(weighted))
    return torch.stack(rows) if rows else x.new_empty(0, x.shape[2], dtype=torch.float64)


def both(function, inputs):
    """Results and gradients of the operator and of its reference, and the truth in float64."""
    results = [function(*inputs), *gradients(function, inputs)]
    with use_reference():
        baseline = [function(*inputs), *gradients(function, inputs)]
        wide = [tensor.double() for tensor in inputs]
        truth = [function(*wide), *gradients(function, wide)]
    return zip(results, baseline, truth, strict=True)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", TOKEN_SHAPES + LONG_SHAPES, ids=str)
def test_results_and_gradients_are_as_accurate_as_pytorch(shape, dtype, kind):
    weight = weights(shape, kind)
    inputs = [tokens(shape, dtype)] if weight is None else [tokens(shape, dtype), weight]
    for prefix in (0, 1) if shape[1] > 2 else (0,):  # of a single token, dw is rounding and nothing else
        function = lambda x, *weight, prefix=prefix: weighted_mean(x, *weight, prefix_tokens=prefix)  # noqa: E731
        with uninitialized_memory_is_nan():
            for result, baseline, truth in both(function, inputs):
                if dtype == torch.float64:  # its own truth
                    assert_close(result, truth, name=f"prefix {prefix}")
                else:
                    assert_as_accurate(result, baseline, truth, name=f"prefix {prefix}")


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_mean_follows_the_definition(kind, reference):
    x, weight = tokens((3, 9, 5), torch.float64), weights((3, 9, 5), kind)
    wide = None if weight is None else weight.double()
    for prefix in (0, 2):
        expected = by_definition(x, weight, prefix)
        if reference:
            with use_reference():
                assert_close(weighted_mean(x, wide, prefix_tokens=prefix), expected)
        else:
            assert_close(weighted_mean(x, wide, prefix_tokens=prefix), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_any_floating_dtype_are_widened(dtype):
    x, weight = tokens((2, 7, 4)), weights((2, 7, 4))
    assert_identical(weighted_mean(x, weight.to(dtype)), weighted_mean(x, weight))


def test_prefix_tokens_take_no_part_whatever_they_hold():
    x, weight = tokens((2, 8, 5)), weights((2, 8, 5), "fractions")
    expected = weighted_mean(x[:, 2:], weight[:, 2:])
    x[:, :2], weight[:, :2] = float("nan"), float("inf")
    assert_identical(weighted_mean(x, weight, prefix_tokens=2), expected)
    for gradient in gradients(lambda *inputs: weighted_mean(*inputs, prefix_tokens=2), [x, weight]):
        assert not gradient[:, :2].any()
        assert gradient[:, 2:].isfinite().all()


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_padding_of_weight_zero_may_hold_anything(garbage, reference):
    x, weight = tokens((2, 40, 70)), weights((2, 40, 70), "fractions")
    weight[:, 5:9] = 0
    clean = x.clone()
    clean[:, 5:9] = 0
    x[:, 5:9] = garbage

    def run(x):
        return [weighted_mean(x, weight), *gradients(weighted_mean, [x, weight])]

    if reference:
        with use_reference():
            found, expected = run(x), run(clean)
    else:
        found, expected = run(x), run(clean)
    for actual, wanted in zip(found, expected, strict=True):
        assert_identical(actual, wanted)


@pytest.mark.parametrize("reference", [False, True])
def test_a_total_weight_of_zero_gives_zero_and_no_gradient(reference):
    x, weight = tokens((3, 4, 5)), weights((3, 4, 5), "fractions")
    weight[0] = 0
    weight[1] = torch.tensor([2.0, -1.0, -1.0, 0.0])  # cancels

    def run():
        return [weighted_mean(x, weight), *gradients(weighted_mean, [x, weight])]

    if reference:
        with use_reference():
            results = run()
    else:
        results = run()
    for result in results:
        assert not result[:2].any()
        assert result[2].any()


def test_negative_weights_are_used_as_they_are():
    x = torch.tensor([[[1.0], [3.0]]])
    assert_close(weighted_mean(x, torch.tensor([[2.0, -1.0]])), torch.tensor([[-1.0]]))


def test_it_compiles_into_one_graph_with_gradients_for_any_shape():
    def loss(x, weight):
        return weighted_mean(x, weight, prefix_tokens=1).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 5, 8), (3, 9, 4), (4, 6, 12)):
        for weight in (None, weights(shape, "fractions")):
            inputs = [tokens(shape)] if weight is None else [tokens(shape), weight]
            found = gradients(lambda x, w=None: compiled(x, w), inputs)
            expected = gradients(lambda x, w=None: loss(x, w), inputs)
            for actual, wanted in zip(found, expected, strict=True):
                assert_close(actual, wanted)


@pytest.mark.parametrize("learned", [False, True])
def test_the_tokens_are_saved_only_for_the_gradient_of_the_weight(learned):
    x, weight = tokens((2, 5, 8)).requires_grad_(), weights((2, 5, 8)).requires_grad_(learned)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        weighted_mean(x, weight)
    assert (x.shape in saved) == learned
    assert all(shape in (x.shape, weight.shape, x.shape[:1]) for shape in saved)


CAPABILITY_CHECK = """
import torch
from mlip_kernels import use_reference, weighted_mean
from mlip_kernels.env import cpu_capability
from mlip_kernels.testing import assert_as_accurate, assert_identical, gradients

every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
for dtype in (torch.float16, torch.bfloat16):
    values = every.view(dtype)[None]  # each bit pattern once, as the gradient that reaches dx = w / W g
    for share in (1.0, 1 / 3, 1e-5):
        found = torch.ops.mlip_kernels.merging_weighted_mean_backward(
            values, torch.full((1, 1), share), torch.ones(1), 1, 0)[:, 0]
        assert_identical(found, (values.float() * share).to(dtype), name=f"{dtype} {share}")
generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    x = torch.randn(2, 50, 67, generator=generator).to(dtype)
    weight = torch.rand(2, 50, generator=generator)
    results = [weighted_mean(x, weight), *gradients(weighted_mean, [x, weight])]
    with use_reference():
        baseline = [weighted_mean(x, weight), *gradients(weighted_mean, [x, weight])]
        truth = [weighted_mean(x.double(), weight), *gradients(weighted_mean, [x.double(), weight.double()])]
    for arguments in zip(results, baseline, truth, strict=True):
        assert_as_accurate(*arguments)
print(cpu_capability())
"""


@pytest.mark.parametrize("capability", instruction_sets.smaller())
def test_every_instruction_set_rounds_alike(capability):
    environment = {**os.environ, "MLIP_KERNELS_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", CAPABILITY_CHECK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == capability
