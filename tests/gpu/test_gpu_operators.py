"""The table of operators on GPU kernels of both backends, emulated and real: what `tests/promises` holds of the CPU."""

import pytest
import torch
from operators import BY_TORCH, assert_right, cases, leading

from mlip_kernels.testing import assert_identical, permuted

DEVICES = [
    pytest.param(("triton", 90), id="triton-sm90"),  # Triton compiles anew for every case
    pytest.param(("cuda", 80), id="cuda-sm80"),
    *(pytest.param((backend,), id=f"{backend}-gpu", marks=pytest.mark.gpu) for backend in ("triton", "cuda")),
]
on_gpus = pytest.mark.parametrize("cuda", DEVICES, indirect=True)


def with_kernels(case):
    """A limit of merges for each target is computed by the reference everywhere."""
    return case.operator.kernels and case.sample not in (*BY_TORCH, "capped")


def leading_with_kernels(case):
    return with_kernels(case) and leading(case)


LEADING = cases(torch.float32, where=leading_with_kernels)


def on(cuda, case):
    """Comparable results and gradients, on the CPU again."""
    with cuda:
        return [y.cpu() for y in case.map(cuda.put).comparable()]


@on_gpus
@pytest.mark.parametrize(
    "case", [*cases(torch.float32, where=with_kernels), *cases(torch.bfloat16, where=leading_with_kernels)]
)
def test_results_and_gradients_are_as_accurate_as_those_of_pytorch(cuda, case):
    assert_right(case, on(cuda, case))
    assert cuda.operators or case.sample == "nothing to merge"


def misaligned(x):
    """One element behind where torch would put it."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def odd_bytes(x):
    """Masks whose true is another byte than 1."""
    return (x.to(torch.uint8) * 254).view(torch.bool) if x.dtype == torch.bool else x


@on_gpus
@pytest.mark.parametrize("case", LEADING)
def test_layouts_and_bytes_of_masks_do_not_matter(cuda, case):
    for change in (permuted, misaligned, odd_bytes):
        found = on(cuda, case.map(change))
        assert_right(case, [y != 0 if y.dtype == torch.bool else y for y in found], name=change.__name__)


@on_gpus
@pytest.mark.parametrize("case", [c for c in LEADING if c.values[0].operator.name != "pair_cross_entropy"])
def test_an_empty_batch_has_empty_or_zero_results_and_gradients(cuda, case):
    empty = case.map_batch(lambda t: t[:0])
    for found, expected in zip(on(cuda, empty), empty.comparable(), strict=True):
        assert_identical(found, expected)
