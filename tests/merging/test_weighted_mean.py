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
    permuted,
    threads,
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


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_gradients_are_those_of_the_function(kind, reference):
    x, weight = tokens((2, 6, 3), torch.float64).requires_grad_(), weights((2, 6, 3), kind)
    inputs = [x] if weight is None else [x, weight.double().requires_grad_()]

    def function(*arguments):
        if reference:
            with use_reference():
                return weighted_mean(*arguments, prefix_tokens=1)
        return weighted_mean(*arguments, prefix_tokens=1)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_any_floating_dtype_are_widened(dtype):
    x, weight = tokens((2, 7, 4)), weights((2, 7, 4))
    assert_identical(weighted_mean(x, weight.to(dtype)), weighted_mean(x, weight))


@pytest.mark.parametrize(
    "prepare", [permuted, lambda x: torch.cat([x, x], 1)[:, x.shape[1] :]], ids=["permuted", "sliced"]
)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_strides_do_not_matter(kind, prepare):
    x, weight = tokens((3, 7, 17)), weights((3, 7, 17), kind)
    inputs = [x] if weight is None else [x, weight]
    strided = [prepare(tensor) for tensor in inputs]
    assert not all(tensor.is_contiguous() for tensor in strided)
    assert_identical(weighted_mean(*strided), weighted_mean(*inputs))
    leaves = [tensor.requires_grad_() for tensor in strided]
    for found, expected in zip(
        torch.autograd.grad(weighted_mean(*leaves).sum(), leaves), gradients_of_sum(inputs), strict=True
    ):
        assert_identical(found.contiguous(), expected)


def gradients_of_sum(inputs):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(weighted_mean(*leaves).sum(), leaves)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_does_not_change_a_bit(dtype):
    x, weight = tokens((3, 700, 130), dtype), weights((3, 700, 130), "fractions")
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append([weighted_mean(x, weight), *gradients(weighted_mean, [x, weight])])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert_identical(first, second)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, permuted])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_operators_pass_the_checks_of_torch(kind, layout):
    x, weight = layout(tokens((3, 7, 5))).requires_grad_(), weights((3, 7, 5), kind)
    weight = None if weight is None else layout(weight).requires_grad_()
    torch.library.opcheck(OPERATORS.merging_weighted_mean.default, (x, weight, 1))
    mean, total = (t.detach() for t in OPERATORS.merging_weighted_mean(x, weight, 1))
    known = None if weight is None else weight.detach()
    torch.library.opcheck(OPERATORS.merging_weighted_mean_backward.default, (layout(mean), known, total, 7, 1))
    if weight is not None:
        arguments = (layout(mean), x.detach(), known, total, 1)
        torch.library.opcheck(OPERATORS.merging_weighted_mean_backward_weight.default, arguments)


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


def test_it_exports_as_one_node():
    class Pool(torch.nn.Module):
        def forward(self, x, weight):
            return weighted_mean(x, weight)

    x, weight = tokens((2, 5, 8)), weights((2, 5, 8), "fractions")
    batch = torch.export.Dim("batch")
    program = torch.export.export(Pool(), (x, weight), dynamic_shapes={"x": {0: batch}, "weight": {0: batch}})
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names.count("mlip_kernels.merging_weighted_mean.default") == 1
    assert_identical(program.module()(x, weight), weighted_mean(x, weight))


def test_a_second_derivative_raises_and_the_reference_computes_it():
    x = tokens((2, 5, 3)).requires_grad_()
    (gradient,) = torch.autograd.grad(weighted_mean(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*use_reference"):
        gradient.sum().backward()
    with use_reference():
        (gradient,) = torch.autograd.grad(weighted_mean(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert_close(second, torch.full_like(x, 2 / 5))


def test_use_reference_keeps_away_from_the_operator():
    x = tokens((2, 5, 3))
    with torch.profiler.profile() as with_kernels:
        weighted_mean(x)
    with torch.profiler.profile() as profile, use_reference():
        assert_close(weighted_mean(x), x.mean(1))
    assert "mlip_kernels::merging_weighted_mean" in {event.name for event in with_kernels.events()}
    assert not [event.name for event in profile.events() if event.name.startswith("mlip_kernels")]


@pytest.mark.parametrize("reference", [False, True])
def test_autocast_changes_neither_dtype_nor_value(reference):
    x, weight = tokens((2, 50, 8)), weights((2, 50, 8))
    expected = weighted_mean(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        if reference:
            with use_reference():
                assert_close(weighted_mean(x, weight), expected)
        else:
            assert_identical(weighted_mean(x, weight), expected)


@pytest.mark.parametrize("learned", [False, True])
def test_the_tokens_are_saved_only_for_the_gradient_of_the_weight(learned):
    x, weight = tokens((2, 5, 8)).requires_grad_(), weights((2, 5, 8)).requires_grad_(learned)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        weighted_mean(x, weight)
    assert (x.shape in saved) == learned
    assert all(shape in (x.shape, weight.shape, x.shape[:1]) for shape in saved)


X, W = torch.zeros(2, 3, 4), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "x: expected a torch.Tensor", ([1.0], None), {}),
        (TypeError, "x: expected dtype", (X.int(), None), {}),
        (ValueError, "x: expected .*got shape", (X[0], None), {}),
        (ValueError, "x: expected .*N, D >= 1", (X[:, :0], None), {}),
        (TypeError, "weight: expected a torch.Tensor", (X, 1.0), {}),
        (TypeError, "weight: expected dtype", (X, W.bool()), {}),
        (ValueError, "weight: expected .*got shape", (X, W[:, 1:]), {}),
        (ValueError, "weight: expected .*got shape", (X, W[..., None]), {}),
        (ValueError, "weight: expected device", (X, W.to("meta")), {}),
        (TypeError, "prefix_tokens: expected an integer", (X, W), {"prefix_tokens": 1.0}),
        (ValueError, "prefix_tokens: .*got -1", (X, W), {"prefix_tokens": -1}),
        (ValueError, "prefix_tokens: .*got 3", (X, W), {"prefix_tokens": 3}),
    ],
)
def test_bad_arguments_are_named(error, message, arguments, options):
    with pytest.raises(error, match=message):
        weighted_mean(*arguments, **options)


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
