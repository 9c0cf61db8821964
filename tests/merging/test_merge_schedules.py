"""From the compression that is wanted to the r of every block."""

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlip_kernels.merging import keep_rate_schedule, merge_layers, merge_schedule, token_counts


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(12, (3, 6, 9)), (24, (6, 12, 18)), (6, (1, 3, 4)), (4, (1, 2, 3)), (3, (0, 1, 2)), (2, (0, 1)), (1, (0,))],
)
def test_default_layers_lie_at_the_quarters_of_the_depth(depth, layers):
    assert merge_layers(depth) == layers


@pytest.mark.parametrize(
    ("keep_rate", "large", "small"),
    [(0.9, 144, 37), (0.8, 101, 26), (0.7, 68, 18), (0.6, 43, 11), (0.5, 25, 7), (1, 196, 49)],
)
def test_final_patches_of_a_twelve_block_model_at_patch_16_and_32(keep_rate, large, small):
    for tokens, final in ((196, large), (49, small)):
        schedule = keep_rate_schedule(keep_rate, tokens, 12)
        assert token_counts(schedule, tokens)[-1] == final
        assert [block for block, r in enumerate(schedule) if r] == ([3, 6, 9] if keep_rate < 1 else [])


def test_schedules_computed_by_hand():
    assert keep_rate_schedule(0.7, 196, 12) == [0, 0, 0, 58, 0, 0, 41, 0, 0, 29, 0, 0]
    assert keep_rate_schedule(0.5, 7, 4) == [0, 3, 2, 1]
    assert keep_rate_schedule(0.25, 16, 3, layers=(0, 2), overall=True) == [8, 0, 4]
    assert keep_rate_schedule(0.5, 196, 12, overall=True)[3:10:3] == [40, 32, 26]
    assert keep_rate_schedule(0.7, 10, 2, layers=()) == [0, 0]
    assert token_counts([0, 3, 100, 1], 10) == [10, 7, 4, 3]
    # In floating point 0.55 * 100 is a little above 55.
    assert keep_rate_schedule(0.55, 100, 1) == [45]


@given(st.integers(1, 600), st.integers(1, 30), st.integers(1, 1000), st.booleans())
def test_a_schedule_keeps_the_wanted_share_and_never_merges_more_than_half(tokens, depth, permille, overall):
    rate, steps = Fraction(permille, 1000), len(merge_layers(depth))
    if rate < Fraction(1, 2) ** (steps if overall else 1):
        with pytest.raises(ValueError, match=r"^keep_rate: .*at least"):
            keep_rate_schedule(float(rate), tokens, depth, overall=overall)
        return
    schedule = keep_rate_schedule(float(rate), tokens, depth, overall=overall)
    left = tokens
    for r in schedule:
        assert 0 <= r <= left // 2
        left -= r
    expected = tokens
    for _ in range(1 if overall else steps):
        expected = ceil(rate * expected)
    assert left == expected
    assert token_counts(schedule, tokens)[-1] == left


@pytest.mark.parametrize(
    ("r", "expected"),
    [
        (8, [8, 8, 8, 8, 8]),
        (0, [0, 0, 0, 0, 0]),
        ((8, 0), [8, 8, 8, 8, 8]),
        ((8, -1.0), [16, 12, 8, 4, 0]),
        ((8, 1.0), [0, 4, 8, 12, 16]),
        ((8, -0.5), [12, 10, 8, 6, 4]),
        ((5, 0.5), [2, 3, 5, 6, 8]),
        ([5, 0, 7], [5, 0, 7, 0, 0]),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
    ],
)
def test_the_forms_of_r(r, expected):
    assert merge_schedule(r, 5) == expected


def test_a_single_block_takes_r_itself():
    assert merge_schedule(6, 1) == merge_schedule((6, -1.0), 1) == merge_schedule([6], 1) == [6]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: keep_rate_schedule(0.49, 196, 12), ValueError, r"keep_rate: .*at least 0\.5"),
        (lambda: keep_rate_schedule(0.12, 196, 12, overall=True), ValueError, r"keep_rate: .*at least 0\.125"),
        (lambda: keep_rate_schedule(0.0, 196, 12), ValueError, "keep_rate"),
        (lambda: keep_rate_schedule(1.1, 196, 12), ValueError, "keep_rate"),
        (lambda: keep_rate_schedule(float("nan"), 196, 12), ValueError, "keep_rate"),
        (lambda: keep_rate_schedule("0.7", 196, 12), TypeError, "keep_rate"),
        (lambda: keep_rate_schedule(0.7, 0, 12), ValueError, "tokens"),
        (lambda: keep_rate_schedule(0.7, 196, 0), ValueError, "depth"),
        (lambda: keep_rate_schedule(0.7, 196, 12, layers=(12,)), ValueError, r"layers\[0\]"),
        (lambda: keep_rate_schedule(0.7, 196, 12, layers=(3, 3)), ValueError, "layers"),
        (lambda: keep_rate_schedule(0.7, 196, 12, layers=(6, 3)), ValueError, "layers"),
        (lambda: keep_rate_schedule(0.7, 196, 12, layers=(), overall=True), ValueError, "layers"),
        (lambda: merge_schedule(-1, 12), ValueError, "r"),
        (lambda: merge_schedule(1.5, 12), TypeError, "r"),
        (lambda: merge_schedule((1, 2, 3), 12), ValueError, "r"),
        (lambda: merge_schedule((8, 1.5), 12), ValueError, r"r\[1\]"),
        (lambda: merge_schedule([1] * 13, 12), ValueError, "r: .*12"),
        (lambda: merge_schedule([1, -1], 12), ValueError, r"r\[1\]"),
        (lambda: merge_layers(0), ValueError, "depth"),
        (lambda: token_counts([1.0], 5), TypeError, r"schedule\[0\]"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=f"^{words}"):
        call()
