"""Merging rows and copying them back on GPUs, emulated and real: the bits of the reference, forward and backward."""

import pytest
import torch

from mlip_kernels import merge_plan
from mlip_kernels.merging import plain as reference
from mlip_kernels.merging.plain import Matching
from mlip_kernels.testing import DTYPES, assert_as_accurate, assert_close, assert_identical, permuted

HALF_AND_SINGLE = tuple(dtype for dtype in DTYPES if dtype != torch.float64)
BACKENDS = ("triton", "cuda")
ARCHITECTURES = {"triton": (90,), "cuda": (80, 90)}  # Triton compiles anew for every case, and alike for both
EMULATED = [
    pytest.param((backend, arch), id=f"{backend}-sm{arch}") for backend in BACKENDS for arch in ARCHITECTURES[backend]
]
REAL = [pytest.param((backend,), id=f"{backend}-gpu", marks=pytest.mark.gpu) for backend in BACKENDS]
SCHEDULED = [
    pytest.param((backend, 80, "random", seed), id=f"{backend}-{seed}") for backend in BACKENDS for seed in (1, 2)
]
on_gpus = pytest.mark.parametrize("cuda", [*EMULATED, *REAL], indirect=True)
on_emulated_gpus = pytest.mark.parametrize("emulated_cuda", EMULATED, indirect=True)

on_gpus_in_few_dtypes = pytest.mark.parametrize(
    ("cuda", "dtype"),
    [
        pytest.param(*gpu.values, dtype, id=f"{gpu.id}-{dtype}", marks=gpu.marks)
        for gpu in [*EMULATED, *REAL]
        for dtype in HALF_AND_SINGLE
        if gpu.values[0] != ("triton", 90) or dtype == torch.bfloat16
    ],
    indirect=["cuda"],
)

OPERATORS = torch.ops.mlip_kernels
KERNELS = ("merging_merge_kernel", "merging_combine_kernel", "merging_spread_kernel")
SHAPES = ((3, 21, 33), (2, 50, 136), (1, 1, 3), (2, 70, 8), (2, 12, 0), (0, 9, 8))


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sizes(batch, tokens):
    """Counts, some of them 0."""
    return torch.randint(0, 4, (batch, tokens), generator=torch.Generator().manual_seed(2)).float()


def matching(batch, tokens, r, *, masked=False):
    """A plan: random, or with a mask under which one sample drops padding for lack of pairs."""
    mask = None
    if masked:
        mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(9)) < 0.7
        mask[:1, tokens // 4 :] = False
    return merge_plan(random(batch, tokens, 4, seed=7), r, mask=mask)._matching()


def crowded(batch, tokens, r):
    """A plan in which all that is removed belongs to the last output row."""
    rows = torch.arange(tokens).repeat(batch, 1)
    assignment = torch.cat((rows[:, : tokens - r], torch.full((batch, r), tokens - r - 1)), dim=1)
    return Matching(assignment, rows[:, : tokens - r].contiguous(), rows[:, tokens - r :].contiguous(), None, None)


def results(x, y, size, plan, put=torch.Tensor.detach):
    """Everything that the operators compute from ``x [B, N, C]`` and ``y [B, N', C]``, and its gradients.

    Masks have another byte than 1 for True: any but 0 is.
    """
    maps = [put(one) for one in plan[:3]]
    mask, dropped = (None if one is None else put((one.to(torch.uint8) * 254).view(torch.bool)) for one in plan[3:])
    x, y = put(x).requires_grad_(), put(y).requires_grad_()
    merged, merged_size, weight = OPERATORS.merging_merge(x, None if size is None else put(size), *maps, mask, dropped)
    spread = OPERATORS.merging_spread(y, None, *maps, dropped)
    (grad_x,) = torch.autograd.grad(merged, x, put(y.detach()))
    (grad_y,) = torch.autograd.grad(spread, y, put(x.detach()))
    weighted = OPERATORS.merging_combine(x.detach(), weight, *maps, dropped)
    found = merged, merged_size, weight, spread, grad_x, grad_y, weighted
    return [one.detach().cpu() for one in found]


def expected(x, y, size, plan):
    """The same by the reference; there, too, merging and spreading are each other's gradient."""
    size = torch.ones(x.shape[:2]) if size is None else size
    merged_size, weight = reference.merged_sizes(size, plan, reference.accumulation_dtype(x.dtype))
    merged = reference.combine(x, weight, plan)
    spread, grad_x = reference.spread(y, None, plan), reference.spread(y, weight, plan)
    return [merged, merged_size, weight, spread, grad_x, reference.combine(x, None, plan), merged]


def assert_same_bits(cuda, x, y, size, plan):
    with cuda:
        found = results(x, y, size, plan, cuda.put)
    names = ("merged", "merged_size", "weight", "spread", "grad_x", "grad_y", "combined")
    for name, one, two in zip(names, found, expected(x, y, size, plan), strict=True):
        assert_identical(one, two, name=name)


@on_gpus_in_few_dtypes
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_and_gradients_are_those_of_the_reference_bit_for_bit(cuda, shape, dtype, masked):
    batch, tokens, channels = shape
    plan = matching(batch, tokens, tokens // 2, masked=masked)
    x, y = random(*shape, dtype=dtype), random(batch, plan.kept.shape[1], channels, dtype=dtype, seed=1)
    assert_same_bits(cuda, x, y, None if masked else sizes(batch, tokens), plan)
    assert cuda.operators == [f"merging_{name}" for name in ("merge", "spread", "spread", "combine", "combine")]


@on_gpus
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_rows_and_gradients_are_as_accurate_as_pytorch(cuda, dtype):
    plan, size = matching(2, 50, 24), sizes(2, 50)
    x, y = random(2, 50, 40, dtype=dtype), random(2, 26, 40, dtype=dtype, seed=1)
    with cuda:
        found = results(x, y, size, plan, cuda.put)
    three = found, expected(x, y, size, plan), expected(x.double(), y.double(), size.double(), plan)
    for one in zip(*three, strict=True):
        assert_as_accurate(*one)


@on_gpus
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_layouts_do_not_matter(cuda, dtype):
    plan, size = matching(2, 21, 9, masked=True), sizes(2, 21)
    x, y = random(2, 21, 48, dtype=dtype), random(2, 12, 48, dtype=dtype, seed=1)
    behind = lambda t: torch.cat((t, t), dim=1)[:, t.shape[1] :]  # noqa: E731
    off = lambda t: torch.cat((t[..., :1], t), dim=2)[..., 1:]  # noqa: E731
    strided = Matching(*(permuted(one) for one in plan))
    for prepare in (permuted, behind, off):
        assert_same_bits(cuda, prepare(x), prepare(y), permuted(size), strided)


@on_gpus
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_rows_that_nothing_is_merged_into_are_copies_whatever_they_hold(cuda, dtype):
    plan = matching(1, 20, 4)
    bits = torch.randint(-(1 << 15), 1 << 15, (1, 20, 16), generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int16).view(dtype) if dtype.itemsize == 2 else (bits << 16 | 0x1234).to(torch.int32).view(dtype)
    x[0, 0, 0] = torch.nan
    with cuda:
        maps = [cuda.put(one) for one in plan[:3]]
        merged = OPERATORS.merging_merge(cuda.put(x), None, *maps, None, None)[0].cpu()
        spread = OPERATORS.merging_spread(cuda.put(merged), None, *maps, None).cpu()
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    alone = torch.bincount(plan.assignment[0]) == 1
    assert alone.any()
    assert torch.equal(merged[0, alone].view(integer), x[0, plan.kept[0, alone]].view(integer))
    assert torch.equal(spread[0].view(integer), merged[0, plan.assignment[0]].view(integer))


@on_gpus
def test_what_is_dropped_may_hold_anything(cuda):
    plan = matching(2, 40, 18, masked=True)
    assert plan.dropped.any()
    x, y = random(2, 40, 24), random(2, 22, 24, seed=1)
    poisoned = x.masked_fill(plan.dropped[..., None], torch.nan)
    with cuda:
        found = results(poisoned, y, None, plan, cuda.put)
    for one, two in zip(found, expected(x, y, None, plan), strict=True):
        assert_identical(one, two)


@on_gpus
@pytest.mark.parametrize("plan", [crowded(1, 2100, 1045), crowded(2, 600, 299), matching(1, 2100, 900)])
def test_long_sequences_and_crowded_rows(cuda, plan):
    """More removed rows than a block lists, than it looks at in one go, and more than one block per sample."""
    batch, tokens = plan.assignment.shape
    x, y = random(batch, tokens, 8), random(batch, plan.kept.shape[1], 8, seed=1)
    assert_same_bits(cuda, x, y, sizes(batch, tokens), plan)


@on_gpus
@pytest.mark.parametrize("which", range(3), ids=["assignment", "kept", "removed"])
def test_numbers_that_are_no_rows_lead_to_no_other_memory(cuda, which):
    """They stand in the place of the first and of the last row, so that no row is named twice."""
    plan = matching(2, 20, 9, masked=which == 2)
    x, y, size = random(2, 20, 8), random(2, 11, 8), sizes(2, 20)
    for number, row in ((2**40, plan[which][1].max()), (-1, plan[which][1].min())):
        maps = [one.clone() for one in plan[:3]]
        maps[which][1].masked_fill_(plan[which][1] == row, number)
        with cuda:
            found = results(x, y, size, Matching(*maps, *plan[3:]), cuda.put)
        assert_identical(found[0][0], expected(x, y, size, plan)[0][0])


@on_gpus
def test_a_plan_that_merges_nothing_copies(cuda):
    plan = matching(2, 19, 0)
    assert_same_bits(cuda, random(2, 19, 8), random(2, 19, 8, seed=1), sizes(2, 19), plan)


@pytest.mark.parametrize("scheduled_cuda", [*SCHEDULED, *REAL], indirect=True)
def test_no_order_of_the_warps_changes_a_bit(scheduled_cuda):
    plan = matching(2, 70, 30, masked=True)
    assert_same_bits(scheduled_cuda, random(2, 70, 24), random(2, 40, 24, seed=1), sizes(2, 70), plan)
    assert scheduled_cuda.operators


@on_gpus
def test_a_second_derivative_is_a_merge_again(cuda):
    plan = matching(2, 21, 9)
    x = random(2, 21, 8)
    with cuda:
        maps = [cuda.put(one) for one in plan[:3]]
        leaf = cuda.put(x).requires_grad_()
        merged = OPERATORS.merging_merge(leaf, None, *maps, None, None)[0]
        (grad,) = torch.autograd.grad(merged.square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), leaf)
        second = second.cpu()
    leaf = x.double().requires_grad_()
    weight = reference.merged_sizes(torch.ones(2, 21), plan, torch.float64)[1]
    (grad,) = torch.autograd.grad(reference.combine(leaf, weight, plan).square().sum(), leaf, create_graph=True)
    assert_close(second, torch.autograd.grad(grad.square().sum(), leaf)[0])


@on_emulated_gpus
@pytest.mark.parametrize("batch", [2, 0])
def test_each_operator_is_one_launch(emulated_cuda, batch):
    plan = matching(batch, 21, 9)
    with emulated_cuda:
        results(random(batch, 21, 8), random(batch, 12, 8), None, plan)
    launched = [name for launch in emulated_cuda.launches for name in KERNELS if name in launch.kernel]
    merge, combine, spread = KERNELS
    assert launched == ([merge, spread, spread, combine, combine] if batch else [])


@on_gpus
def test_float64_is_left_to_the_reference(cuda):
    plan, x, y = matching(2, 21, 9), random(2, 21, 5).double(), random(2, 12, 5).double()
    with cuda:
        found = results(x, y, None, plan, cuda.put)
    for one, two in zip(found, expected(x, y, None, plan), strict=True):
        assert_close(one, two)
    assert not cuda.operators
