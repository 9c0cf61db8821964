"""pair_cross_entropy on GPUs, emulated and real: accuracy, labels, smoothing, hard input, layouts of both backends."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from mlip_kernels import pair_cross_entropy
from mlip_kernels.testing import assert_as_accurate, assert_identical, permuted

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
PREFIX = "contrastive_pair_cross_entropy"
FORWARD, BACKWARD = ("tiles_forward", "finish_forward", "loss_forward"), ("backward", "targets_backward")
CASES = (  # rows, columns, smoothing, whether labels are the diagonal
    (1, 1, 0.0, True),
    (70, 70, 0.1, False),
    (192, 192, 0.0, True),  # whole tiles and more than one
    (150, 301, 0.1, False),  # rows only, tails in every direction
)


def problem(rows, columns, dtype, *, diagonal=True):
    """Logits with matching pairs well above the rest, and labels."""
    random = torch.Generator().manual_seed(rows)
    logits = 3 * torch.randn(rows, columns, generator=random)
    logits.diagonal().add_(15)
    labels = torch.arange(rows) if diagonal else torch.randint(0, min(rows, columns), (rows,), generator=random)
    return logits.to(dtype), labels


def options_of(logits, smoothing):
    directions = "both" if logits.shape[0] == logits.shape[1] else "rows"
    return {"directions": directions, "label_smoothing": smoothing}


def value_and_gradient(function, logits, labels, options):
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, labels, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def on(cuda, logits, labels, options):
    with cuda:
        results = value_and_gradient(pair_cross_entropy, cuda.put(logits), cuda.put(labels), options)
    return [result.cpu() for result in results]


def by_torch(logits, labels, *, directions, **options):
    loss = cross_entropy(logits, labels, **options)
    return loss if directions == "rows" else (loss + cross_entropy(logits.T, labels, **options)) / 2


def assert_right(results, logits, labels, options):
    # PyTorch adds up float16 in float16, which overflows.
    narrow = logits.float() if logits.dtype == HALF else logits
    baseline = [result.to(logits.dtype) for result in value_and_gradient(by_torch, narrow, labels, options)]
    truth = value_and_gradient(by_torch, logits.double(), labels, options)
    for name, *three in zip(("loss", "gradient"), results, baseline, truth, strict=True):
        assert_as_accurate(*three, name=name)


@pytest.mark.parametrize(("rows", "columns", "smoothing", "diagonal"), CASES)
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF], ids=str)
def test_value_and_gradient_are_as_accurate_as_those_of_torch(cuda, dtype, rows, columns, smoothing, diagonal):
    logits, labels = problem(rows, columns, dtype, diagonal=diagonal)
    options = options_of(logits, smoothing)
    assert_right(on(cuda, logits, labels, options), logits, labels, options)
    assert cuda.operators == [PREFIX, f"{PREFIX}_backward"]


def test_each_pass_launches_its_kernels(emulated_cuda):
    logits, labels = problem(9, 9, SINGLE)
    on(emulated_cuda, logits, labels, options_of(logits, 0.0))
    launched = [launch.kernel for launch in emulated_cuda.launches]
    assert len(launched) == len(FORWARD + BACKWARD)
    for kernel, name in zip(launched, FORWARD + BACKWARD, strict=True):
        assert f"{PREFIX}_{name}_kernel" in kernel


@pytest.mark.parametrize("spread", [1e-3, 1000.0])
def test_large_logits_neither_overflow_nor_cancel(cuda, spread):
    logits, labels = problem(70, 70, SINGLE)
    logits, options = spread * logits, options_of(logits, 0.1)
    assert_right(on(cuda, logits, labels, options), logits, labels, options)


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_infinities_and_nan_mean_what_they_mean_in_torch(cuda, value):
    logits, labels = problem(150, 150, SINGLE)
    logits[2, 5] = value  # one logit
    options = options_of(logits, 0.0)
    assert_right(on(cuda, logits, labels, options), logits, labels, options)
    logits[3, :128] = logits[:64, 7] = value  # all of a row in one tile, and of a column
    labels[3], labels[7] = 140, 149
    assert_right(on(cuda, logits, labels, options), logits, labels, options)
    logits[:, 9] = value  # all of a column
    (loss, gradient), (expected, _) = (
        on(cuda, logits, labels, options),
        value_and_gradient(by_torch, logits, labels, options),
    )
    torch.testing.assert_close(loss, expected, equal_nan=True)
    assert gradient[:, 9].isnan().all()


def test_smoothing_makes_an_impossible_class_infinitely_costly(cuda):
    logits, labels = problem(9, 9, SINGLE)
    logits[2, 5] = -torch.inf
    assert on(cuda, logits, labels, options_of(logits, 0.1))[0] == torch.inf


def test_a_label_that_names_no_column_gives_nan(cuda):
    logits, labels = problem(9, 9, SINGLE)
    labels[4] = 9
    loss, gradient = on(cuda, logits, labels, options_of(logits, 0.0))
    assert loss.isnan()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("offset", [None, 16, 1])
def test_layouts_do_not_matter(cuda, offset):
    logits, labels = problem(80, 80, BRAIN)
    options = options_of(logits, 0.1)
    moved = permuted(logits) if offset is None else torch.cat([logits[:, :offset], logits], 1)[:, offset:]
    assert not moved.is_contiguous()
    results = on(cuda, moved, torch.stack([labels, labels], 1)[:, 0], options)
    assert_right(results, logits, labels, options)
    if offset != 1:  # the same kernels, which may read several elements at a time
        for found, wanted in zip(results, on(cuda, logits, labels, options), strict=True):
            assert_identical(found, wanted)


def test_no_pairs_cost_nothing(cuda):
    loss, gradient = on(cuda, torch.zeros(0, 0), torch.arange(0), {"reduction": "sum"})
    assert loss == 0
    assert gradient.shape == (0, 0)


def test_no_order_of_the_warps_changes_a_bit(scheduled_cuda):
    logits, labels = problem(70, 70, SINGLE, diagonal=False)
    options = options_of(logits, 0.1)
    expected = on(scheduled_cuda.under("round_robin"), logits, labels, options)
    for found, wanted in zip(on(scheduled_cuda, logits, labels, options), expected, strict=True):
        assert_identical(found, wanted)
