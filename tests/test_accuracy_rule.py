"""The rule of accuracy itself: it lets equally accurate results pass, of one element too, and catches wrong ones."""

import pytest
import torch

from mlip_kernels.testing import FEW, assert_as_accurate, assert_identical

DRAWS = 1000


def two_sums(elements: int, seed: int, terms: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of positive terms in float32, one after the other, in two orders, and in float64: equally accurate."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(elements, terms, generator=generator)
    orders = values, values[:, torch.randperm(terms, generator=generator)]
    one, other = (order.cumsum(1)[:, -1] for order in orders)
    return one, other, values.double().sum(1)


def broken(draws: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> int:
    count = 0
    for draw in draws:
        try:
            assert_as_accurate(*draw)
        except AssertionError:
            count += 1
    return count


@pytest.mark.parametrize("elements", [1, 4, 16, FEW])
def test_equally_accurate_results_pass(elements):
    assert broken([two_sums(elements, seed) for seed in range(DRAWS)]) <= DRAWS // 1000


@pytest.mark.parametrize("elements", [1, FEW, FEW + 1])
def test_an_error_of_thirty_roundings_is_noticed(elements):
    _, baseline, truth = two_sums(elements, 0)
    wrong = baseline * (1 + 30 * torch.finfo(torch.float32).eps)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_as_accurate(wrong, baseline, truth)


@pytest.mark.parametrize(("scale", "passes"), [(None, False), (20.0, True)])
def test_a_small_difference_of_large_numbers_has_the_roundings_of_those(scale, passes):
    truth = torch.tensor([1e-6], dtype=torch.float64)
    found, exact = truth.float() + 4 * torch.finfo(torch.float32).eps * 20, truth.float()
    if passes:
        assert_as_accurate(found, exact, truth, scale=scale)
    else:
        with pytest.raises(AssertionError, match="exceeds"):
            assert_as_accurate(found, exact, truth, scale=scale)


@pytest.mark.parametrize("other", [torch.finfo(torch.float32).max, -torch.inf, torch.nan, 0.0])
def test_infinity_is_identical_to_itself_alone(other):
    infinite = torch.tensor([1.0, torch.inf])
    assert_identical(infinite, infinite.clone())
    with pytest.raises(AssertionError):
        assert_identical(infinite, torch.tensor([1.0, other]))
