"""Any byte but 0 of a mask is true, as for torch: `uint8.view(bool)` and `frombuffer` make others than 1."""

import pytest
import torch
from public_operators import MASK, MASKED_PLAN, METRIC, TEXT_MASK, TEXTS, TOKENS, names_of, recorded_calls

import mlip_kernels as mk
from mlip_kernels.testing import assert_identical, gradients

CALLS = [
    (operator, arguments)
    for operator, arguments in recorded_calls()
    if any(isinstance(a, torch.Tensor) and a.dtype == torch.bool and a.any() for a in arguments)
]
every_byte = pytest.mark.parametrize("byte", [2, 254, 255])


def with_true_as(byte, value):
    """The same mask, in which this byte stands for True."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        return value
    return (value.to(torch.uint8) * byte).view(torch.bool)


def all_identical(found, expected):
    found, expected = ([results] if isinstance(results, torch.Tensor) else results for results in (found, expected))
    for one, two in zip(found, expected, strict=True):
        assert_identical(one != 0 if one.dtype == torch.bool else one, two)


def test_every_registered_operator_with_a_mask_is_called_with_one():
    names = {operator._schema.name.partition("::")[2] for operator, _ in CALLS}
    assert names == {
        *(f"merging_{name}" for name in ("match", "merge", "combine", "spread")),
        "token_logits",
        "token_logits_backward",
    }


@every_byte
@pytest.mark.parametrize(("operator", "arguments"), CALLS, ids=names_of(CALLS))
def test_registered_operators_take_any_byte(operator, arguments, byte):
    for dtype in (torch.float32, torch.float64):
        given = [a.to(dtype) if isinstance(a, torch.Tensor) and a.dtype == torch.float64 else a for a in arguments]
        if dtype == torch.float32 or given == list(arguments):
            all_identical(operator(*(with_true_as(byte, a) for a in given)), operator(*given))


MASKED = {
    "token_logits": lambda byte, v, t: mk.token_logits(
        v, t, image_mask=with_true_as(byte, MASK), text_mask=with_true_as(byte, TEXT_MASK)
    ),
    "merge_tokens": lambda byte, v, t: mk.merge_tokens(v, METRIC, 4, mask=with_true_as(byte, MASK))[:2],
    "merge_tokens capped": lambda byte, v, t: mk.merge_tokens(
        v, METRIC, 4, mask=with_true_as(byte, MASK), max_merges=1
    )[:2],
    "MergePlan": lambda byte, v, t: plan_of(byte).unmerge(plan_of(byte).merge(v)[0]),
    "MergePlan.then": lambda byte, v, t: plan_of(byte).then(mk.merge_plan(METRIC[:, :9], 2)).merge(v),
}


def plan_of(byte):
    p = MASKED_PLAN
    flags = {"mask": with_true_as(byte, p.mask), "dropped": with_true_as(byte, p.dropped)}
    return mk.MergePlan(p.assignment, p.kept, p.removed, p.prefix_tokens, **flags)


@every_byte
@pytest.mark.parametrize("call", MASKED.values(), ids=MASKED.keys())
@pytest.mark.parametrize("plain", [False, True], ids=["operators", "reference"])
def test_public_functions_take_any_byte(call, byte, plain):
    def both(byte):
        inputs = [TOKENS.float(), TEXTS.float()]
        results = call(byte, *inputs)
        results = [results] if isinstance(results, torch.Tensor) else results
        return [*results, *gradients(lambda *x: call(byte, *x), inputs)]

    if plain:
        with mk.use_reference():
            all_identical(both(byte), both(1))
    else:
        all_identical(both(byte), both(1))


@every_byte
def test_plans_are_the_same(byte):
    for limit in (None, 1):
        found, expected = (mk.merge_plan(METRIC, 4, mask=with_true_as(b, MASK), max_merges=limit) for b in (byte, 1))
        for name in ("assignment", "kept", "removed", "mask", "dropped"):
            assert torch.equal(getattr(found, name).bool(), getattr(expected, name).bool()), name
