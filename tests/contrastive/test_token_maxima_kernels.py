"""The kernels of token maxima against the reference: values, winners, gradients, hard input, threads, instruction sets.

Tokens of small integers have exact similarities in every dtype, full of ties: winners must then be those of the
reference, one by one.
"""

import os
import subprocess
import sys

import instruction_sets
import pytest
import torch

from mlip_kernels._library import LOADED
from mlip_kernels.contrastive import plain as reference
from mlip_kernels.testing import (
    DTYPES,
    assert_as_accurate,
    assert_close,
    assert_identical,
    permuted,
    threads,
    uninitialized_memory_is_nan,
)

FORWARD = torch.ops.mlip_kernels.contrastive_token_maxima.default
BACKWARD = torch.ops.mlip_kernels.contrastive_token_maxima_backward.default
COMPILED_ONLY = pytest.mark.skipif(
    LOADED["cpu"] != "ok", reason="needs the compiled CPU part: the reference promises less"
)
MASKS = ("none", "padded texts", "anywhere")
SHAPES = (  # B, N, C, M, D: below, at and above vectors, register tiles, tiles and groups
    (1, 1, 1, 1, 1),
    (3, 14, 5, 16, 4),
    (5, 15, 4, 33, 7),
    (2, 29, 60, 17, 33),
    (20, 7, 3, 77, 130),
    (4, 60, 30, 50, 8),
    (2, 3, 2, 300, 5),
)


def problem(b, n, c, m, d, *, dtype=torch.float32, mask="anywhere", integers=True, seed=0):
    """Arguments of the forward operator, without what is to be kept."""
    random = torch.Generator().manual_seed(seed)

    def tokens(batch, count):
        if integers:
            return torch.randint(-2, 3, (batch, count, d), generator=random).to(dtype)
        return torch.nn.functional.normalize(torch.randn(batch, count, d, generator=random), dim=-1).to(dtype)

    def weights(*shape):
        return 0.5 + torch.rand(shape, generator=random, dtype=torch.float64)

    def anywhere(batch, count):
        some = torch.rand(batch, count, generator=random) < 0.6
        some[batch // 2] = False
        return some

    sides, masks = (tokens(b, n), tokens(c, m)), [None, None]
    if mask == "padded texts":
        masks[1] = torch.arange(m) < torch.randint(1, m + 1, (c, 1), generator=random)
    elif mask == "anywhere":
        masks = [anywhere(b, n), anywhere(c, m)]
    both = zip(sides, masks, (weights(b, n), weights(c, m)), strict=True)
    return [*sides, *masks, *(reference.normalized_weights(*one) for one in both)]


def backward_arguments(arguments, best_text, best_image):
    """Arguments of the backward operator, for the images and for the texts."""
    images, texts, image_mask, text_mask, image_normalized_weight, text_normalized_weight = arguments
    random = torch.Generator().manual_seed(1)
    shape = (images.shape[0], texts.shape[0])
    to_images = torch.randn(shape, generator=random, dtype=torch.float64).to(image_normalized_weight.dtype)
    to_texts = torch.randn(shape[::-1], generator=random, dtype=torch.float64).to(image_normalized_weight.dtype)
    own = (
        to_images,
        to_texts,
        texts,
        image_mask,
        text_mask,
        image_normalized_weight,
        text_normalized_weight,
        best_text,
        best_image,
    )
    maps = best_image.transpose(0, 1), best_text.transpose(0, 1)
    return own, (
        to_texts,
        to_images,
        images,
        text_mask,
        image_mask,
        text_normalized_weight,
        image_normalized_weight,
        *maps,
    )


def assert_same_maxima(arguments, roundings=8.0):
    """Winners of real tokens are those of the reference; where a side has no token they are masked ones."""
    image_mask, text_mask = arguments[2:4]
    with uninitialized_memory_is_nan():
        results = FORWARD(*arguments, True, True)
    expected = reference.token_maxima(*arguments, True, True)
    for actual, wanted in zip(results[:2] + results[4:], expected[:2] + expected[4:], strict=True):
        assert_close(actual, wanted, roundings=roundings)
    for actual, wanted, own, other in (
        (results[2], expected[2], image_mask, text_mask),
        (results[3].transpose(0, 1), expected[3].transpose(0, 1), text_mask, image_mask),
    ):
        assert actual.dtype == wanted.dtype
        real = torch.ones(actual.shape, dtype=torch.bool)
        if own is not None:
            real &= own[:, None]
        if other is not None:
            real &= other.any(1)[None, :, None]
            nothing = ~other.any(1)
            found = torch.gather(other[nothing].expand(actual.shape[0], -1, -1), 2, actual[:, nothing].long())
            assert not found.any()
        assert torch.equal(actual[real], wanted[real])
    return results


def double(arguments):
    return [t.double() if t is not None and t.is_floating_point() else t for t in arguments]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_similarities_have_the_winners_of_the_reference(shape, dtype, mask):
    assert_same_maxima(problem(*shape, dtype=dtype, mask=mask))


@pytest.mark.parametrize("channels", [64, 512, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_similarities_are_as_accurate_as_those_of_the_reference(dtype, channels):
    arguments = problem(4, 49, 6, 77, channels, dtype=dtype, mask="none", integers=False)
    results = (FORWARD, reference.token_maxima)
    ours, pytorch = (function(*arguments, True, True) for function in results)
    truth = reference.token_maxima(*double(arguments), True, True)
    for position in (0, 1, 4, 5):
        assert_as_accurate(ours[position], pytorch[position], truth[position])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_texts_than_are_packed_at_a_time(dtype):
    channels = 2**24 // (70 * 77 * dtype.itemsize) + 40
    assert_same_maxima(problem(2, 3, 70, 77, channels, dtype=dtype, mask="padded texts"))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_as_accurate_as_those_of_the_reference(shape, dtype, mask):
    arguments = problem(*shape, dtype=dtype, mask=mask, integers=False)
    maps = FORWARD(*arguments, True, False)[2:4]
    for given in backward_arguments(arguments, *maps):
        with uninitialized_memory_is_nan():
            actual = BACKWARD(*given)
        assert actual.dtype == dtype
        truth = reference.token_maxima_backward(*double(given))
        if dtype == torch.float64:
            assert_close(actual, truth)
        else:
            assert_as_accurate(actual, reference.token_maxima_backward(*given), truth)
        if given[3] is not None:
            assert (actual[~given[3]] == 0).all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_gradients_are_those_of_the_reference(dtype, mask):
    """Small integers and eighths as coefficients: every sum is exact until it is rounded to the dtype of the tokens."""
    arguments = problem(3, 9, 4, 21, 70, dtype=dtype, mask=mask)
    arguments[4:] = [(share > 0).to(share.dtype) / 8 for share in arguments[4:]]
    for given in backward_arguments(arguments, *FORWARD(*arguments, True, False)[2:4]):
        given = ((given[0] * 2).round(), (given[1] * 2).round(), *given[2:])
        expected = reference.token_maxima_backward(*double(given)).to(dtype)
        assert_identical(BACKWARD(*given), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_indices_beyond_16_bits(dtype):
    arguments = problem(1, 2, 1, 2**15 + 1, 3, dtype=dtype, mask="none")
    maps = assert_same_maxima(arguments, roundings=64.0)[2:4]
    assert maps[0].dtype == torch.int32
    for given in backward_arguments(arguments, *maps):
        truth = reference.token_maxima_backward(*double(given))
        assert_as_accurate(BACKWARD(*given), reference.token_maxima_backward(*given), truth)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tokens_that_are_not_finite_spoil_what_they_spoil_in_pytorch(dtype, value):
    arguments = problem(4, 17, 5, 19, 6, dtype=dtype, mask="none")
    arguments[0][1, 3, 2] = arguments[1][2, 18] = value
    results = zip(FORWARD(*arguments, True, True), reference.token_maxima(*arguments, True, True), strict=True)
    for actual, expected in results:
        if actual.is_floating_point():
            assert torch.equal(actual.isnan(), expected.isnan())
            assert torch.equal(actual.isinf(), expected.isinf())
            assert_close(actual.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0))
        else:
            assert_identical(actual, expected)
    untouched = FORWARD(*arguments, False, False)[0][[0, 2, 3]][:, [0, 1, 3, 4]]
    assert untouched.isfinite().all()


def test_similarities_that_overflow_are_infinite():
    arguments = problem(2, 3, 2, 4, 5, mask="none")
    arguments[0][0, 1], arguments[1][1, 2] = 1e30, 1e30
    results = FORWARD(*arguments, True, True)
    for actual, expected in zip(results, reference.token_maxima(*arguments, True, True), strict=True):
        assert torch.equal(actual.isinf(), expected.isinf())
    assert results[4][0, 1, 1] == torch.inf


@COMPILED_ONLY
@pytest.mark.parametrize("layout", [permuted, lambda t: torch.stack((t, t), -1)[..., 0]], ids=["permuted", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(dtype, layout):
    arguments = problem(3, 9, 4, 18, 37, dtype=dtype)
    maps = FORWARD(*arguments, True, True)
    for actual, expected in zip(FORWARD(*map(layout, arguments), True, True), maps, strict=True):
        assert_identical(actual, expected)
    for given in backward_arguments(arguments, *maps[2:4]):
        assert_identical(BACKWARD(*map(layout, given)), BACKWARD(*given))


def test_tokens_behind_a_class_token_are_read_where_they_are():
    arguments = problem(3, 9, 4, 18, 37)
    arguments[0] = torch.cat((torch.full((3, 1, 37), float("nan")), arguments[0]), 1)[:, 1:]
    assert_same_maxima(arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(9, 25, 40, 33, 300), (1, 40, 12, 25, 300), (2, 31, 3, 40, 530)], ids=str)
def test_the_number_of_threads_changes_nothing(shape, dtype):
    arguments = problem(*shape, dtype=dtype, integers=False)

    def results(count):
        with threads(count):
            found = FORWARD(*arguments, True, True)
            return [*found, *(BACKWARD(*given) for given in backward_arguments(arguments, *found[2:4]))]

    expected = results(1)
    for count in (1, 2, 3, 2):
        for actual, wanted in zip(results(count), expected, strict=True):
            assert_identical(actual, wanted)


@COMPILED_ONLY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pair_does_not_depend_on_the_batch_around_it(dtype):
    arguments = problem(7, 25, 40, 33, 65, dtype=dtype, integers=False)
    whole = FORWARD(*arguments, True, True)
    part = FORWARD(*(t[3:5] if i % 2 == 0 else t[21:24] for i, t in enumerate(arguments)), True, True)
    for actual, expected in zip(part[2:], whole[2:], strict=True):
        assert_identical(actual, expected[3:5, 21:24].contiguous())
    assert_identical(part[0], whole[0][3:5, 21:24].contiguous())
    assert_identical(part[1], whole[1][21:24, 3:5].contiguous())


@COMPILED_ONLY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_changes_nothing(dtype):
    images, texts, *_ = problem(3, 20, 5, 40, 65, dtype=dtype, integers=False)
    mask = (torch.arange(40) < 23).expand(5, 40)
    shares = [reference.normalized_weights(images, None, None), reference.normalized_weights(texts, mask, None)]
    padded = FORWARD(images, texts, None, mask, *shares, True, True)
    texts, shares[1] = texts[:, :23], shares[1][:, :23]
    short = FORWARD(images, texts, None, None, *shares, True, True)
    for position, expected in enumerate(short):
        actual = padded[position]
        assert_identical(actual[..., :23].contiguous() if position in (3, 5) else actual, expected)


@COMPILED_ONLY
def test_a_direct_call_cannot_read_outside_its_tensors():
    arguments = problem(2, 3, 4, 5, 6)
    wrong = {
        0: torch.zeros(2, 3, 7),
        1: torch.zeros(4, 5, 6, dtype=torch.float64),
        2: torch.ones(2, 4, dtype=torch.bool),
        3: torch.ones(4, 5),
        4: torch.ones(3, 3),
        5: torch.ones(4, 5, dtype=torch.float64),
    }
    for position, value in wrong.items():
        with pytest.raises(RuntimeError):
            FORWARD(*arguments[:position], value, *arguments[position + 1 :], True, False)
    best_text, best_image = FORWARD(*arguments, True, False)[2:4]
    given, _ = backward_arguments(arguments, best_text, best_image)
    for position, value in {0: torch.ones(4, 2), 1: torch.ones(2, 4), 7: best_image, 8: best_image.long()}.items():
        with pytest.raises(RuntimeError):
            BACKWARD(*given[:position], value, *given[position + 1 :])
    astray = torch.full_like(best_text, 255), torch.full_like(best_image, 255)
    assert BACKWARD(*given[:7], *astray).isfinite().all()


@pytest.mark.parametrize("capability", instruction_sets.smaller())
def test_every_instruction_set(capability):
    """The kernels are chosen once per process, so the tests above run again in another."""
    environment = {**os.environ, "MLIP_KERNELS_CPU_CAPABILITY": capability}
    chosen = "exact_similarities and (60 or 130) or as_accurate and (130 or 300) or not_finite"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
