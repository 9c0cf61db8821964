"""The contrastive family on its GPU kernels: values, winners and gradients, masks, ties, hard input.

Tokens of small integers have exact similarities in every dtype, full of ties: winners must then be those of the
reference, one by one.
"""

import pytest
import torch

from mlip_kernels.reference import contrastive as reference
from mlip_kernels.testing import assert_as_accurate

FORWARD = torch.ops.mlip_kernels.contrastive_token_maxima.default
BACKWARD = torch.ops.mlip_kernels.contrastive_token_maxima_backward.default
BACKENDS = ("triton",)
SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
ODD = (3, 49, 11, 37, 33)  # B, N, C, M, D: tails in every direction, texts in two groups
ALIGNED = (2, 49, 9, 77, 64)
MANY_ROWS = (2, 150, 3, 40, 33)  # a tile has 64 tokens of an image, and 32 of each of 4 texts
BEYOND_A_BYTE = (2, 257, 1, 300, 17)


def on(*devices):
    """Run on these architectures with these dtypes, and on a real GPU: kernels are compiled when a test runs."""
    cases = [
        pytest.param((backend, arch), dtype, id=f"{backend}-sm{arch}-{str(dtype).removeprefix('torch.')}")
        for backend in BACKENDS
        for arch, dtype in devices
    ]
    cases += [
        pytest.param((backend,), dtype, id=f"{backend}-gpu-{str(dtype).removeprefix('torch.')}", marks=pytest.mark.gpu)
        for backend in BACKENDS
        for dtype in (SINGLE, BRAIN, HALF)
    ]
    return pytest.mark.parametrize(("cuda", "dtype"), cases, indirect=["cuda"])


def problem(b, n, c, m, d, *, dtype, masked=True, integers=True, seed=0):
    """Arguments of the forward operator, without what is to be kept; of masks, one row has no real token."""
    random = torch.Generator().manual_seed(seed)

    def tokens(batch, count):
        if integers:
            return torch.randint(-2, 3, (batch, count, d), generator=random).to(dtype)
        return torch.nn.functional.normalize(torch.randn(batch, count, d, generator=random), dim=-1).to(dtype)

    def mask(batch, count):
        padding = torch.arange(count) < torch.randint(1, count + 1, (batch, 1), generator=random)
        some = padding & (torch.rand(batch, count, generator=random) < 0.7)
        some[batch // 2] = False
        return some

    sides = tokens(b, n), tokens(c, m)
    masks = [mask(b, n), mask(c, m)] if masked else [None, None]
    weights = [0.5 + torch.rand(side.shape[:2], generator=random, dtype=torch.float64) for side in sides]
    return [*sides, *masks, *(reference.shares(*one) for one in zip(sides, masks, weights, strict=True))]


def double(arguments):
    return [t.double() if t is not None and t.is_floating_point() else t for t in arguments]


def forward(cuda, arguments, keep_best=True, keep_maxima=True):
    with cuda:
        results = FORWARD(*(None if t is None else cuda.put(t) for t in arguments), keep_best, keep_maxima)
    return [t.cpu() for t in results]


def assert_same_maxima(results, arguments):
    """Winners of real tokens are those of the reference; where a side has no token they are masked ones."""
    image_mask, text_mask = arguments[2:4]
    expected, truth = (reference.token_maxima(*given, True, True) for given in (arguments, double(arguments)))
    for position in (0, 1, 4, 5):
        assert_as_accurate(results[position], expected[position], truth[position])
    for actual, wanted, own, other in (
        (results[2], expected[2], image_mask, text_mask),
        (results[3].transpose(0, 1), expected[3].transpose(0, 1), text_mask, image_mask),
    ):
        assert actual.dtype == wanted.dtype
        real = torch.ones(actual.shape, dtype=torch.bool)
        if own is not None:
            nothing = ~other.any(1)
            real = own[:, None] & ~nothing[None, :, None]
            won = torch.gather(other[nothing].expand(actual.shape[0], -1, -1), 2, actual[:, nothing].long())
            assert not won.any()
        assert torch.equal(actual[real], wanted[real])


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("shape", [ODD, MANY_ROWS], ids=str)
@on((80, SINGLE), (90, BRAIN))
def test_winners_are_those_of_the_reference(cuda, shape, dtype, masked):
    arguments = problem(*shape, dtype=dtype, masked=masked)
    assert_same_maxima(forward(cuda, arguments), arguments)
    assert cuda.operators == ["contrastive_token_maxima"]


def backward_arguments(arguments, best_text, best_image):
    """Arguments of the backward operator, for the images and for the texts."""
    images, texts, image_mask, text_mask, image_share, text_share = arguments
    random = torch.Generator().manual_seed(1)
    to_images, to_texts = (torch.randn(shape, generator=random) for shape in ((len(images), len(texts)),) * 2)
    to_texts = to_texts.t()
    own = (to_images, to_texts, texts, image_mask, text_mask, image_share, text_share, best_text, best_image)
    maps = best_image.transpose(0, 1), best_text.transpose(0, 1)
    return own, (to_texts, to_images, images, text_mask, image_mask, text_share, image_share, *maps)


def backward(cuda, arguments):
    with cuda:
        return BACKWARD(*(None if t is None else cuda.put(t) for t in arguments)).cpu()


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("shape", [ODD, MANY_ROWS], ids=str)
@on((80, SINGLE), (80, HALF), (90, BRAIN))
def test_gradients_are_as_accurate_as_those_of_the_reference(cuda, shape, dtype, masked):
    arguments = problem(*shape, dtype=dtype, masked=masked, integers=False)
    maps = reference.token_maxima(*arguments, True, False)[2:4]
    for given in backward_arguments(arguments, *maps):
        actual = backward(cuda, given)
        assert_as_accurate(
            actual, reference.token_maxima_backward(*given), reference.token_maxima_backward(*double(given))
        )
        if masked:
            assert not actual[~given[3]].any()
