"""Choosing which tokens merge on GPUs, emulated and real: the pairs of the reference, to the last tie."""

import sys
from pathlib import Path

import pytest
import torch

from mlip_kernels import merge_plan, use_reference
from mlip_kernels.testing import permuted

sys.path.append(str(Path(__file__).parents[1] / "merging"))
from test_merge_kernels import assert_same_plan, masks, metrics, random

BACKENDS = ("triton",)
EMULATED = [pytest.param((backend, arch), id=f"{backend}-sm{arch}") for backend in BACKENDS for arch in (80, 90)]
REAL = [pytest.param((backend,), id=f"{backend}-gpu", marks=pytest.mark.gpu) for backend in BACKENDS]
SCHEDULED = [pytest.param((backend, 80, "random", 1), id=f"{backend}-random") for backend in BACKENDS]
on_gpus = pytest.mark.parametrize("cuda", [*EMULATED, *REAL], indirect=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = ("merging_match_kernel", "merging_match_similarities_kernel", "merging_match_maps_kernel")


def assert_plan_of_reference(cuda, metric, r, **options):
    given = dict(options)
    if (mask := given.get("mask")) is not None:
        given["mask"] = (mask.to(torch.uint8) * 254).view(torch.bool)  # any byte but 0 is true
    with cuda:
        placed = {key: cuda.put(value) if isinstance(value, torch.Tensor) else value for key, value in given.items()}
        found = merge_plan(cuda.put(metric), r, **placed)
    with use_reference():
        expected = merge_plan(metric, r, **options)
    assert_same_plan(found, expected)
    return expected


def masked(batch, tokens):
    """A mask under which the last sample has no pair at all, so that it drops padding only."""
    mask = masks(batch, tokens)
    mask[-1, 3:] = False
    return mask


# One kernel is compiled for all that is plain, and another one for all that has a mask and a guide.
@on_gpus
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plans_are_those_of_the_reference_to_the_last_tie(cuda, dtype):
    for kind in ("random", "similar", "few values", "scaled"):
        for tokens, r, prefix in ((197, 16, 1), (21, 1000, 0), (3, 1, 0)):
            assert_plan_of_reference(cuda, metrics(kind, 1, tokens, 64, dtype=dtype), r, prefix_tokens=prefix)
        for tokens, r, prefix in ((140, 40, 2), (21, 3, 5), (2, 1, 0)):
            guide, mask = random(2, tokens, seed=1), masked(2, tokens)
            assert_plan_of_reference(
                cuda,
                permuted(metrics(kind, 2, tokens, 33, dtype=dtype)),
                r,
                guide=guide,
                guide_weight=0.3,
                prefix_tokens=prefix,
                mask=permuted(mask),
            )
    assert set(cuda.operators) == {"merging_match"}


@on_gpus
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_tokens_tie_to_the_lowest(cuda, dtype):
    metric = random(1, 1, 64).expand(1, 150, 64).to(dtype)
    plan = assert_plan_of_reference(cuda, metric, 20)
    assert plan.removed[0].tolist() == [2 * (k + 1) for k in range(20)]
    assert (plan.assignment[0].gather(0, plan.removed[0]) == 1 + 74 - 20).all()


@on_gpus
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")], ids=str)
def test_tokens_without_direction_have_cosine_zero_and_odd_guides_an_order(cuda, value):
    metric = metrics("random", 2, 70, 33)
    metric[0, 10], metric[0, 11, 4], metric[0, 33], metric[1, 1::2] = value, value, value, -metric[1, :1].abs()
    metric[1, 13], metric[1, 0::2] = value, metric[1, :1].abs()  # the best cosine is 0
    guide = random(2, 70, seed=1)
    for place, odd in enumerate((float("nan"), float("inf"), -float("inf"), 1e30, -1e30)):
        guide[:, 4 * place + 4] = odd
    for weight in (1.0, -1e300):
        for r in (3, 30):
            assert_plan_of_reference(
                cuda, permuted(metric), r, guide=guide, guide_weight=weight, mask=torch.ones(2, 70, dtype=torch.bool)
            )


@pytest.mark.parametrize("cuda", [EMULATED[0], *REAL], indirect=True)
def test_long_plans_take_two_launches_and_others_one(cuda):
    for tokens, launches in ((1024, KERNELS[:1]), (1301, KERNELS[1:])):
        before = len(getattr(cuda, "launches", ()))
        metric, guide = permuted(metrics("few values", 1, tokens, 33)), random(1, tokens, seed=1)
        assert_plan_of_reference(
            cuda, metric, tokens // 3, guide=guide, guide_weight=0.3, prefix_tokens=2, mask=masks(1, tokens)
        )
        if hasattr(cuda, "launches"):
            assert [launch.kernel for launch in cuda.launches[before:]] == list(launches)


@pytest.mark.parametrize("scheduled_cuda", [*SCHEDULED, *REAL], indirect=True)
def test_no_order_of_the_warps_changes_a_choice(scheduled_cuda):
    assert_plan_of_reference(scheduled_cuda, metrics("few values", 1, 197, 64), 50)


@on_gpus
def test_an_empty_batch_and_float64_launch_nothing(cuda):
    assert_plan_of_reference(cuda, random(0, 9, 33), 3)
    assert_plan_of_reference(cuda, random(1, 9, 33, dtype=torch.float64), 3)
    assert not getattr(cuda, "launches", ())
