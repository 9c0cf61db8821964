"""Launches that are kept: which ones are equal, and that those which are not get a kernel of their own."""

import pytest
import torch
import triton
import triton.language as tl

from mlip_kernels.testing import assert_identical
from mlip_kernels.triton import launch as launching
from mlip_kernels.triton.launch import KEPT, ceil_div, launch, next_power_of_2


@triton.jit
def scaled_kernel(x, bias, y, count, factor, half: tl.constexpr, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    value = tl.load(x + i, mask=i < count).to(tl.float32) * factor
    if bias is not None:
        value += tl.load(bias + i, mask=i < count)
    if half:
        value *= 0.5
    tl.store(y + i, value.to(y.dtype.element_ty), mask=i < count)


def scaled(x, bias, factor, half):
    y = torch.empty_like(x)
    launch(scaled_kernel, (ceil_div(x.numel(), 32),), x, bias, y, x.numel(), factor, half=half, block=32, num_warps=1)
    return y


@pytest.fixture(params=(80, 90), ids="sm{}".format)
def run(request, needs_emulated):
    """`scaled` on an emulated GPU, on which nothing was launched before."""
    needs_emulated("triton")
    from emulated_cuda import EmulatedCuda

    vars(scaled_kernel).pop(KEPT, None)
    with EmulatedCuda("triton", request.param) as device:
        yield lambda x, bias=None, factor=2.0, half=False: device.run(scaled, x, bias, factor, half)


@pytest.fixture
def bound(monkeypatch):
    """The launches that Triton bound and specialised."""
    launches, bind = [], triton.JITFunction.run

    def count(kernel, *arguments, **options):
        launches.append(arguments)
        return bind(kernel, *arguments, **options)

    monkeypatch.setattr(triton.JITFunction, "run", count)
    return launches


def test_equal_launches_are_bound_once(run, bound):
    for seed in range(3):
        x = torch.randn(100, generator=torch.Generator().manual_seed(seed))
        assert_identical(run(x), 2 * x)
    assert len(bound) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.arange(100.0).half()},
        {"x": torch.arange(101.0)},
        {"x": torch.arange(1.0)},
        {"bias": torch.arange(100.0)},
        {"factor": 3.0},
        {"half": True},
    ],
    ids=lambda changed: f"{next(iter(changed))} {getattr(next(iter(changed.values())), 'shape', '')}",
)
def test_other_launches_are_bound_anew_and_right(run, bound, changed):
    arguments = {"x": torch.arange(100.0), "bias": None, "factor": 2.0, "half": False}
    for given in (arguments, arguments | changed, arguments):
        bias = 0.0 if given["bias"] is None else given["bias"]
        expected = (given["x"].float() * given["factor"] + bias) * (0.5 if given["half"] else 1.0)
        assert_identical(run(**given), expected.to(given["x"].dtype))
    assert len(bound) == 2


def test_misaligned_tensors_take_the_road_of_triton(run, bound):
    x = torch.arange(101.0)
    assert_identical(run(x[:100]), 2 * x[:100])
    for _ in range(2):
        assert_identical(run(x[1:]), 2 * x[1:])
    assert len(bound) == 3


def test_shapes_without_end_do_not_fill_the_memory(run, monkeypatch):
    monkeypatch.setattr(launching, "MOST_LAUNCHES", 3)
    for count in range(1, 9):
        assert_identical(run(torch.arange(float(count))), 2 * torch.arange(float(count)))
        assert len(vars(scaled_kernel)[KEPT]) <= 3


@pytest.mark.compiles_nothing
def test_integer_functions_are_those_of_triton():
    for number in range(1, 300):
        assert next_power_of_2(number) == triton.next_power_of_2(number)
        assert [ceil_div(number, by) for by in range(1, 40)] == [triton.cdiv(number, by) for by in range(1, 40)]
