"""`out` is returned holding the result there is without it, whatever its layout, and nothing beside it is written."""

import contextlib

import pytest
import torch
from operators import BY_TORCH, cases, parameters, tensors

import mlip_kernels as mk
from mlip_kernels._library import LOADED
from mlip_kernels.testing import assert_identical, permuted, uninitialized_memory_is_nan


def beside_others(like):
    """Memory that starts at no multiple of a vector."""
    return torch.full((like.numel() + 2,), 7.0, dtype=like.dtype)[1:-1].view(like.shape)


def within_others(like):
    """Every second channel of a larger tensor."""
    return torch.full((*like.shape, 2), 7.0, dtype=like.dtype)[..., 1]


WRITING = cases(torch.float32, torch.bfloat16, torch.float64, where=lambda case: "out" in parameters(case.operator))
LAYOUTS = (beside_others, within_others, permuted)
every_case = pytest.mark.parametrize("case", WRITING)


def into(case, out):
    """The result written into these tensors, which are what is returned."""
    returned = case.operator.function(**case.arguments, out=out[0] if len(out) == 1 else tuple(out))
    assert all(one is other for one, other in zip(tensors(returned), out, strict=True))


@pytest.mark.parametrize("definition", [contextlib.nullcontext, mk.use_reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("batch", [2, 0])
@every_case
def test_out_holds_the_result(case, batch, definition):
    case = case.map_batch(lambda t: t[:batch])
    with definition(), uninitialized_memory_is_nan():
        expected = case()
        for layout in LAYOUTS:
            out = [layout(y.clone()) for y in expected]
            into(case, out)
            for y, wanted in zip(out, expected, strict=True):
                assert_identical(y, wanted)
                memory = torch.empty(0, dtype=y.dtype).set_(y.untyped_storage())
                y.fill_(7)
                assert layout is permuted or (memory == 7).all()


@every_case
def test_out_may_share_memory_with_an_input(case):
    expected = case()
    name, x = case.names[0], case.inputs[0]
    size = max(x.numel(), expected[0].numel())
    for start in (0, 5):
        memory = torch.zeros(len(expected) * size + start, dtype=x.dtype)
        shared = memory[: x.numel()].view(x.shape).copy_(x)
        out = [memory[start + i * size :][: y.numel()].view(y.shape) for i, y in enumerate(expected)]
        into(case.replace(**{name: shared}), out)
        for y, wanted in zip(out, expected, strict=True):
            assert_identical(y, wanted)


@every_case
def test_what_autograd_would_record_is_refused(case):
    out = [y.clone() for y in case()]
    for name, x in zip(case.names, case.inputs, strict=True):
        with pytest.raises(RuntimeError, match=r"^out(\[0\])?: .* has no gradient"):
            into(case.replace(**{name: x.clone().requires_grad_()}), out)
    for y, wanted in zip(out, case(), strict=True):
        assert_identical(y, wanted)
        y.requires_grad_()
    with pytest.raises(RuntimeError, match=r"^out(\[0\])?: .* has no gradient"):
        into(case, out)


@pytest.mark.skipif(LOADED["cpu"] != "ok", reason="needs the compiled CPU part: pip install .")
@every_case
def test_nothing_of_the_size_of_the_result_is_allocated(case):
    if case.sample in BY_TORCH:
        pytest.skip("is documented to compute and copy")
    large = case.map_batch(lambda t: t.repeat(64, *[1] * (t.dim() - 1)))
    out = large()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        into(large, out)
    allocated = max((event.cpu_memory_usage for event in profile.function_events), default=0)
    assert allocated < out[0].nbytes / 2
