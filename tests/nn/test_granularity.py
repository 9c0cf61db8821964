"""Three-way merging keeps the shares it is told, and what is informative."""

import pytest
import torch

from mlip_kernels.nn.granularity import three_way_plan
from mlip_kernels.testing import assert_close, assert_identical


@pytest.mark.parametrize(
    ("shares", "left"), [((0.5, 0.3), 0.70), ((0.4, 0.3), 0.625), ((0.25, 0.25), 0.5), ((1.0, 0.0), 1.0)]
)
def test_the_shares_fix_the_rate(shares, left):
    plan = three_way_plan(torch.randn(2, 401, 8), torch.rand(2, 401), shares)
    assert plan.merged_tokens == 1 + round(left * 400)


def test_informative_tokens_stay_as_they_are():
    x, guide = torch.randn(3, 41, 8), torch.rand(3, 41)
    plan = three_way_plan(x, guide, (0.5, 0.3))
    merged, size = plan.merge(x)
    stay = guide[:, 1:].topk(20).indices.sort(1).values + 1
    assert_identical(merged[:, 1:21], x.gather(1, stay[..., None].expand(-1, -1, 8)))
    assert_identical(merged[:, 0], x[:, 0])
    assert torch.equal(size[:, :21], torch.ones(3, 21))


def test_every_token_is_counted_once():
    x, guide, size = torch.randn(2, 38, 5), torch.rand(2, 38), torch.randint(1, 9, (2, 38)).float()
    plan = three_way_plan(x, guide, (0.3, 0.4), size=size)
    merged, merged_size = plan.merge(x)
    assert_identical(merged_size.sum(1), size.sum(1))
    assert_close((merged * merged_size[..., None]).sum(1), (x.double() * size[..., None]).sum(1))
    for sample in range(2):
        for token in range(plan.merged_tokens):
            members = plan.assignment[sample] == token
            assert merged_size[sample, token] == size[sample, members].sum()


@pytest.mark.parametrize("tokens", [1, 2, 3, 6])
def test_few_tokens_still_merge(tokens):
    plan = three_way_plan(torch.randn(2, tokens, 4), torch.rand(2, tokens), (0.3, 0.3))
    merged, size = plan.merge(torch.randn(2, tokens, 4))
    assert merged.shape[1] == plan.merged_tokens
    assert size.sum() == 2 * tokens


@pytest.mark.parametrize("shares", [(-0.1, 0.5), (0.7, 0.4)])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ValueError, match="shares"):
        three_way_plan(torch.randn(1, 9, 4), torch.rand(1, 9), shares)
