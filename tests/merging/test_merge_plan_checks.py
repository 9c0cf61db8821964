"""A plan that somebody makes or loads is checked once; plans of `merge_plan` and `then` are not looked at."""

import copy
import io
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mlip_kernels import MergePlan, merge_plan, use_reference
from mlip_kernels.merging import plan as plan_module
from mlip_kernels.testing import assert_identical

X = torch.randn(2, 13, 6, generator=torch.Generator().manual_seed(0))
MASK = torch.arange(13) < torch.tensor([[13], [8]])
MAPS = ("assignment", "kept", "removed", "mask", "dropped")
LARGE = 2**40


def parts(plan):
    return {name: getattr(plan, name) for name in (*MAPS, "prefix_tokens", "size")}


def rows(*numbers):
    return torch.tensor([numbers], dtype=torch.int64)


GOOD = {"assignment": rows(0, 1, 2, 2), "kept": rows(0, 1, 2), "removed": rows(3), "prefix_tokens": 0}

BAD = [
    ("assignment", ValueError, {"assignment": rows(0, LARGE, 2, 2)}),
    ("assignment", ValueError, {"assignment": rows(0, 1, 2, -1)}),
    ("assignment", ValueError, {"assignment": rows(0, 1, 2, 3)}),
    ("assignment", ValueError, {"assignment": rows(0, 0, 0, 0)}),
    ("assignment", ValueError, {"assignment": rows(1, 0, 2, 2)}),
    ("kept", ValueError, {"kept": rows(0, 1, LARGE)}),
    ("kept", ValueError, {"kept": rows(0, 1, -1)}),
    ("removed", ValueError, {"removed": rows(LARGE)}),
    ("removed", ValueError, {"removed": rows(-LARGE)}),
    ("kept, removed", ValueError, {"removed": rows(2)}),
    ("kept, removed", ValueError, {"assignment": rows(0, 0, 0, 1), "kept": rows(0, 3), "removed": rows(1, 1)}),
    ("kept", ValueError, {"kept": rows(), "removed": rows(0, 1, 2, 3)}),
    ("kept", ValueError, {"kept": rows(0, 1, 2, 3, 3), "removed": rows()}),
    ("kept", ValueError, {"kept": rows(0, 1, 2).expand(2, -1)}),
    ("removed", ValueError, {"removed": rows(3, 3)}),
    ("assignment", TypeError, {"assignment": rows(0, 1, 2, 2).int()}),
    ("kept", TypeError, {"kept": [[0, 1, 2]]}),
    ("removed", ValueError, {"removed": torch.tensor([3])}),
    ("mask", ValueError, {"mask": torch.ones(1, 4, dtype=torch.bool)}),
    ("mask", TypeError, {"mask": torch.ones(1, 3)}),
    ("dropped", ValueError, {"dropped": torch.ones(1, 3, dtype=torch.bool)}),
    ("dropped", ValueError, {"dropped": torch.tensor([[False, True, False, False]])}),
    ("kept", ValueError, {"kept": rows(0, 1, 2).to("meta")}),
    ("prefix_tokens", ValueError, {"prefix_tokens": 5}),
    ("prefix_tokens", TypeError, {"prefix_tokens": 0.0}),
    ("size", ValueError, {"size": torch.ones(1, 3)}),
]


@pytest.mark.parametrize(("name", "error", "changed"), BAD)
def test_maps_that_are_none_of_a_matching_are_named(name, error, changed):
    with pytest.raises(error, match=rf"^{name}: expected"):
        MergePlan(**{**GOOD, **changed})


@pytest.mark.parametrize(("name", "error", "changed"), [case for case in BAD if "size" not in case[2]])
def test_loading_checks_as_well(name, error, changed):
    plan = MergePlan(**GOOD)
    for field, value in changed.items():
        object.__setattr__(plan, field, value)
    stored = pickle.dumps(plan)
    with pytest.raises(error, match=rf"^{name}: expected"):
        pickle.loads(stored)
    with pytest.raises(error, match=rf"^{name}: expected"):
        copy.deepcopy(plan)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("r", [0, 5])
def test_plans_of_our_own_pass_and_are_the_same_after_loading(mask, r):
    first = merge_plan(X, r, size=torch.ones(2, 13), mask=mask)
    merged = first.merge(X)[0]
    empty = merge_plan(X[:0], r, mask=None if mask is None else mask[:0])
    masked, plain = (first.then(merge_plan(merged, 2, mask=second)) for second in (first.mask, None))
    for plan in (first, masked, plain, empty):
        file = io.BytesIO()
        torch.save(plan, file)
        file.seek(0)
        loaded = [MergePlan(**parts(plan)), pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)]
        with torch.serialization.safe_globals([MergePlan]):
            loaded.append(torch.load(file, weights_only=True))
        for again in loaded:
            x = X[: len(plan.kept)]
            for one, two in zip(again.merge(x), plan.merge(x), strict=True):
                assert_identical(one, two)
            assert again.prefix_tokens == plan.prefix_tokens


def test_plans_of_our_own_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(plan_module, "check_maps", None)
    plan = merge_plan(X, 5)
    plan.then(merge_plan(plan.merge(X)[0], 2))
    with pytest.raises(TypeError):
        MergePlan(**parts(plan))


def test_order_and_padding_are_free():
    """What no memory depends on is not refused: the order of rows, and what masks say of them."""
    plan = MergePlan(rows(1, 2, 0, 1, 0), rows(2, 0, 1), rows(4, 3), 0, mask=torch.zeros(1, 3, dtype=torch.bool))
    x = X[:1, :5]
    with use_reference():
        expected = plan.merge(x)
    for one, two in zip(plan.merge(x), expected, strict=True):
        assert_identical(one, two)


def test_plans_can_be_made_while_something_is_traced():
    def again(x):
        plan = merge_plan(x, 3)
        return MergePlan(**parts(plan)).merge(x)[0]

    expected = merge_plan(X, 3).merge(X)[0]
    assert_identical(torch.compile(again, backend="aot_eager", fullgraph=True)(X), expected)
    assert_identical(torch.func.vmap(again)(X[None])[0], expected)
    with FakeTensorMode() as mode:
        assert again(mode.from_tensor(X)).shape == expected.shape
    with torch.device("meta"):
        assert MergePlan(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in GOOD.items()}).r == 1


def test_what_changes_a_plan_afterwards_is_noticed_before_memory_is_touched():
    plan = MergePlan(**{name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in GOOD.items()})
    plan.removed.fill_(LARGE)
    with pytest.raises((RuntimeError, IndexError)):
        plan.merge(X[:1, :4])
