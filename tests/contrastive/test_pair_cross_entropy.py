"""pair_cross_entropy: equal to torch's cross-entropy on a matrix and its transpose, with less memory."""

import functools
import math
from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import cross_entropy

from mlip_kernels import pair_cross_entropy, use_reference
from mlip_kernels.contrastive import plain as reference
from mlip_kernels.testing import (
    DTYPES,
    assert_as_accurate,
    assert_close,
    assert_identical,
    gradients,
    threads,
    uninitialized_memory_is_nan,
)

OPERATORS = torch.ops.mlip_kernels


def matrix(rows, columns, dtype=torch.float64, *, spread=3.0):
    """Logits with the matching pairs well above the rest, as in training: small losses of large numbers."""
    random = torch.Generator().manual_seed(rows + columns)
    logits = spread * torch.randn(rows, columns, generator=random, dtype=torch.float64)
    logits.diagonal().add_(6 * spread)
    return logits.to(dtype)


def by_torch(logits, labels=None, *, directions="both", **options):
    labels = torch.arange(len(logits)) if labels is None else labels
    loss = cross_entropy(logits, labels, **options)
    return loss if directions == "rows" else (loss + cross_entropy(logits.T, labels, **options)) / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (13, 13), (13, 29), (50, 50)])
def test_value_and_gradient_are_as_accurate_as_those_of_torch(rows, columns, smoothing, dtype):
    options = {"label_smoothing": smoothing, "directions": "both" if rows == columns else "rows"}
    logits = matrix(rows, columns, dtype)
    with uninitialized_memory_is_nan():
        found = [pair_cross_entropy(logits, **options)]
        found += gradients(lambda x: pair_cross_entropy(x, **options), [logits])
    torchs = [by_torch(logits, **options), *gradients(lambda x: by_torch(x, **options), [logits])]
    wide = logits.double()
    truth = [by_torch(wide, **options), *gradients(lambda x: by_torch(x, **options), [wide])]
    for actual, baseline, exact in zip(found, torchs, truth, strict=True):
        assert actual.dtype == dtype
        if dtype == torch.float64:  # its own truth, as exact as a probability near 1 is
            assert_close(actual + 1, exact + 1)
        else:
            assert_as_accurate(actual, baseline, exact)


def no_change(logits):
    pass


def far_apart(logits):
    """Exponentials of these logits overflow in some tiles and vanish in others."""
    logits[7] += 1000
    logits[:, 1050:1060] -= 500


def nothing_in_a_tile(logits):
    logits[3, :1024] = logits[:70, 5] = logits[70:140, :1024] = -torch.inf
    logits.diagonal().copy_(torch.randn(len(logits)))


@pytest.mark.parametrize("change", [no_change, far_apart, nothing_in_a_tile])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("directions", ["both", "rows"])
def test_more_than_one_tile_of_logits(directions, dtype, change):
    logits = matrix(1100, 1100, torch.float32)
    change(logits)
    logits = logits.to(dtype)
    for smoothing in (0.0,) if change is nothing_in_a_tile else (0.0, 0.1):
        options = {"directions": directions, "label_smoothing": smoothing}

        def results(function, x, options=options):
            return function(x, **options), *gradients(lambda y: function(y, **options), [x])

        ways = results(pair_cross_entropy, logits), results(by_torch, logits), results(by_torch, logits.double())
        for three in zip(*ways, strict=True):
            assert_as_accurate(*three)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("log_sum_exp", [0.0, 700.0])
def test_exponentials_are_as_accurate_as_those_of_torch(log_sum_exp, dtype):
    """Without targets, the gradient of a row is exp(l - lse), with and without a subtraction."""
    logits = torch.linspace(-80.0 if dtype == torch.float32 else -690.0, 75.0, 100_001, dtype=dtype) + log_sum_exp
    logits[:3] = torch.tensor([-torch.inf, torch.nan, 0.0])
    terms = torch.tensor([[log_sum_exp], [0.0]], dtype=dtype)
    arguments = torch.ones((), dtype=dtype), logits[None], torch.tensor([2]), terms, terms.new_empty(2, 0), False, 0.0
    found = OPERATORS.contrastive_pair_cross_entropy_backward(*arguments)[0]
    assert found[0] == 0
    assert found[1].isnan()
    exact = torch.tensor([math.exp(x) for x in (logits[3:] - log_sum_exp).tolist()], dtype=torch.float64)
    if dtype == torch.float64:  # the truth is rounded as the exponentials are
        torch.testing.assert_close(found[3:], exact, rtol=4 * torch.finfo(dtype).eps, atol=0)
    else:
        assert_as_accurate(*(one.double() / exact for one in (found[3:], torch.exp(logits[3:] - log_sum_exp), exact)))


class Chunked(torch.autograd.Function):
    """What runs where there is no kernel: a few rows at a time."""

    @staticmethod
    def forward(ctx, logits, labels, both, smoothing):
        loss, *terms = reference.pair_cross_entropy_and_terms(logits, labels, both, smoothing)
        ctx.save_for_backward(logits, labels, *terms)
        ctx.options = both, smoothing
        return loss

    @staticmethod
    def backward(ctx, grad):
        return reference.pair_cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "columns"), [(13, 13), (13, 29), (50, 50)])
def test_the_reference_in_chunks_is_as_accurate_as_torch(monkeypatch, rows, columns, smoothing):
    monkeypatch.setattr(reference, "LOGITS_AT_A_TIME", 40)  # a few rows, the last chunk shorter
    both, logits = rows == columns, matrix(rows, columns, torch.float32)
    labels = torch.arange(rows) * 5 % 11  # each named by several
    options = {"labels": labels, "label_smoothing": smoothing, "directions": "both" if both else "rows"}

    def chunked(x):
        return Chunked.apply(x, labels, both, smoothing)

    def torchs(x):
        return by_torch(x, **options, reduction="sum")

    with uninitialized_memory_is_nan():
        found = [chunked(logits), *gradients(chunked, [logits])]
    baseline, truth = ([torchs(x), *gradients(torchs, [x])] for x in (logits, logits.double()))
    for three in zip(found, baseline, truth, strict=True):
        assert_as_accurate(*three)


@pytest.mark.parametrize("spread", [1e-3, 30.0, 1000.0])
@pytest.mark.parametrize("directions", ["both", "rows"])
def test_large_logits_neither_overflow_nor_cancel(spread, directions):
    logits = matrix(11, 11, torch.float32, spread=spread)
    for function in (lambda f, x: f(x, directions=directions), lambda f, x: gradients(lambda y: f(y), [x])[0]):
        exact = function(by_torch, logits.double())
        assert_as_accurate(function(pair_cross_entropy, logits), function(by_torch, logits), exact)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_labels_may_name_any_pairs(smoothing, reduction):
    labels = torch.tensor([3, 0, 0, 8, 2, 8, 1, 5, 4])
    options = {"label_smoothing": smoothing, "reduction": reduction}
    for directions in ("both", "rows"):
        ours = functools.partial(pair_cross_entropy, labels=labels, directions=directions, **options)
        torchs = functools.partial(by_torch, labels=labels, directions=directions, **options)
        logits = matrix(9, 9)
        assert_close(ours(logits), torchs(logits))
        assert_close(gradients(ours, [logits])[0] + 1, gradients(torchs, [logits])[0] + 1)


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
@pytest.mark.parametrize("where", [(2, 5), (5, 5), (slice(None), 3), (4, slice(None))])
def test_infinities_and_nan_mean_what_they_mean_in_torch(where, value):
    logits = matrix(8, 8)
    logits[where] = value
    for options in ({}, {"directions": "rows"}, {"label_smoothing": 0.1}):
        torch.testing.assert_close(pair_cross_entropy(logits, **options), by_torch(logits, **options), equal_nan=True)


@pytest.mark.parametrize("label", [-100, -1, 3, 2**62])
@pytest.mark.parametrize("directions", ["both", "rows"])
def test_labels_that_name_no_column_are_an_error(label, directions):
    labels, logits, terms = torch.tensor([0, label, 2]), torch.zeros(3, 3), torch.zeros(2, 3)
    message = f"labels: expected numbers from 0 to 2, got {label}"
    for context in (nullcontext(), use_reference()):
        with context, pytest.raises(ValueError, match=f"^{message}"):
            pair_cross_entropy(logits, labels, directions=directions)
    with pytest.raises(RuntimeError, match=message):
        OPERATORS.contrastive_pair_cross_entropy_backward(torch.ones(()), logits, labels, terms, terms, True, 0.0)


def test_labels_whose_values_cannot_be_read_make_the_loss_nan():
    logits = torch.stack([matrix(3, 3), matrix(3, 3)])
    labels = torch.tensor([[0, 1, 2], [0, -100, 2]])
    losses = torch.func.vmap(pair_cross_entropy)(logits, labels)
    assert_close(losses[0] + 1, pair_cross_entropy(logits[0], labels[0]) + 1)
    assert losses[1].isnan()


def test_no_pairs_have_no_mean():
    for directions, columns in (("both", 0), ("rows", 3)):
        logits = torch.zeros(0, columns, requires_grad=True)
        assert pair_cross_entropy(logits, directions=directions).isnan()
        loss = pair_cross_entropy(logits, directions=directions, reduction="sum")
        assert loss.detach() == 0
        assert torch.autograd.grad(loss, logits)[0].shape == logits.shape


@pytest.mark.parametrize("rows", [600, 40_000])
def test_bits_do_not_depend_on_the_number_of_threads(rows):
    logits, directions = (matrix(rows, rows, torch.float32), "both") if rows == 600 else (torch.rand(rows, 4), "rows")
    labels = torch.arange(rows) % logits.shape[1]
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(gradients(lambda x: pair_cross_entropy(x, labels, directions=directions), [logits]))
            results[-1].append(pair_cross_entropy(logits, labels, directions=directions))
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert_identical(one, same)


def test_the_only_matrices_are_the_logits_and_their_gradient():
    batch, width = 1200, 8
    features = torch.randn(2, batch, width, requires_grad=True)

    def bytes_saved(loss):
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss(features[0] @ features[1].T)
        return sum(storages.values())

    square, vectors = 4 * batch**2, 2 * 4 * batch * width + 8 * batch
    assert bytes_saved(by_torch) >= 2 * square
    assert bytes_saved(pair_cross_entropy) <= square + vectors + 16 * batch

    def peak(loss):
        logits = (features[0] @ features[1].T).detach().requires_grad_()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
            torch.autograd.grad(loss(logits), logits)
        allocated = highest = 0
        for event in run.profiler.kineto_results.events():
            if event.name() == "[memory]":
                allocated += event.nbytes()
                highest = max(highest, allocated)
        return highest

    assert peak(pair_cross_entropy) <= square + square // 8
    assert peak(by_torch) >= 3 * square


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_under_autocast_the_loss_is_float32_as_that_of_torch(dtype):
    logits = matrix(9, 9, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = pair_cross_entropy(logits), by_torch(logits)
        assert loss.dtype == expected.dtype == torch.float32
        assert_as_accurate(loss, expected, by_torch(logits.double()), scale=float(logits.abs().max()))


@pytest.mark.parametrize(("message", "columns", "labels"), [("C >= B", 2, None), ("C >= 1, got", 0, torch.arange(3))])
def test_rows_without_a_column_are_refused(message, columns, labels):
    with pytest.raises(ValueError, match=f"^logits: expected .*{message}"):
        pair_cross_entropy(torch.zeros(3, columns), labels, directions="rows")
