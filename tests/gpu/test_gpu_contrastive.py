"""The contrastive family on its GPU kernels: values, winners and gradients, masks, ties, hard input.

Tokens of small integers have exact similarities in every dtype, full of ties: winners must then be those of the
reference, one by one.
"""

import pytest
import torch

from mlip_kernels import token_logits, use_reference
from mlip_kernels.contrastive import plain as reference
from mlip_kernels.testing import assert_as_accurate, assert_identical, permuted

FORWARD = torch.ops.mlip_kernels.contrastive_token_maxima.default
BACKWARD = torch.ops.mlip_kernels.contrastive_token_maxima_backward.default
BACKENDS = ("triton", "cuda")
SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
ODD = (3, 49, 11, 37, 33)  # B, N, C, M, D: tails in every direction, texts in two groups
MANY_ROWS = (2, 150, 3, 40, 33)  # a tile has 64 tokens of an image, and 32 of each of 4 texts
CASES = ((ODD, False), (ODD, True), (MANY_ROWS, True))


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
        some[:, -1] |= torch.arange(batch) == 0  # one that is not padded
        some[batch // 2] = False
        return (some.to(torch.uint8) * 254).view(torch.bool)  # any byte but 0 is true

    sides = tokens(b, n), tokens(c, m)
    masks = [mask(b, n), mask(c, m)] if masked else [None, None]
    weights = [0.5 + torch.rand(side.shape[:2], generator=random, dtype=torch.float64) for side in sides]
    return [*sides, *masks, *(reference.normalized_weights(*one) for one in zip(sides, masks, weights, strict=True))]


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


def backward_arguments(arguments, best_text, best_image):
    """Arguments of the backward operator, for the images and for the texts."""
    images, texts, image_mask, text_mask, image_normalized_weight, text_normalized_weight = arguments
    random = torch.Generator().manual_seed(1)
    to_images, to_texts = (torch.randn(shape, generator=random) for shape in ((len(images), len(texts)),) * 2)
    to_texts = to_texts.t()
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


def backward(cuda, arguments):
    with cuda:
        return BACKWARD(*(None if t is None else cuda.put(t) for t in arguments)).cpu()


@pytest.mark.parametrize(("shape", "masked"), CASES, ids=str)
@on((80, SINGLE), (90, BRAIN))
def test_exact_similarities_have_the_winners_of_the_reference(cuda, shape, dtype, masked):
    arguments = problem(*shape, dtype=dtype, masked=masked)
    assert_same_maxima(forward(cuda, arguments), arguments)
    assert cuda.operators == ["contrastive_token_maxima"]


@pytest.mark.parametrize(("shape", "masked"), CASES, ids=str)
@on((80, SINGLE), (80, HALF), (90, BRAIN))
def test_values_and_gradients_are_as_accurate_as_those_of_the_reference(cuda, shape, dtype, masked):
    arguments = problem(*shape, dtype=dtype, masked=masked, integers=False)
    results = forward(cuda, arguments)
    expected, truth = (reference.token_maxima(*given, True, True) for given in (arguments, double(arguments)))
    for position in (0, 1, 4, 5):
        assert_as_accurate(results[position], expected[position], truth[position])
    for given in backward_arguments(arguments, *results[2:4]):
        actual = backward(cuda, given)
        baseline, truth = (reference.token_maxima_backward(*one) for one in (given, double(given)))
        assert_as_accurate(actual, baseline, truth)
        if masked:
            assert not actual[~given[3]].any()
    assert cuda.operators == ["contrastive_token_maxima", *["contrastive_token_maxima_backward"] * 2]


@on((90, BRAIN))
def test_maps_of_more_than_a_byte(cuda, dtype):
    arguments = problem(2, 257, 1, 300, 17, dtype=dtype, masked=False)
    results = forward(cuda, arguments)
    assert results[2].dtype == results[3].dtype == torch.int16
    assert_same_maxima(results, arguments)
    given, _ = backward_arguments(arguments, *results[2:4])
    baseline, truth = (reference.token_maxima_backward(*one) for one in (given, double(given)))
    assert_as_accurate(backward(cuda, given), baseline, truth)


@on((80, SINGLE))
def test_what_is_not_wanted_is_not_kept_and_changes_nothing(cuda, dtype):
    arguments = problem(*MANY_ROWS, dtype=dtype)
    everything = forward(cuda, arguments)
    for keep_best, keep_maxima in ((True, False), (False, True), (False, False)):
        kept = (True, True, keep_best, keep_best, keep_maxima, keep_maxima)
        results = forward(cuda, arguments, keep_best, keep_maxima)
        for actual, expected, wanted in zip(results, everything, kept, strict=True):
            assert_identical(actual, expected if wanted else expected.new_empty(0))


@pytest.mark.parametrize("layout", [permuted, lambda t: torch.stack((t, t), -1)[..., 0]], ids=["permuted", "strided"])
@on((80, SINGLE))
def test_layouts_do_not_matter(cuda, layout, dtype):
    arguments = problem(2, 17, 3, 18, 32, dtype=dtype)
    results = forward(cuda, arguments)
    for actual, expected in zip(forward(cuda, [layout(t) for t in arguments]), results, strict=True):
        assert_identical(actual, expected)
    for given in backward_arguments(arguments, *results[2:4]):
        assert_identical(backward(cuda, [layout(t) for t in given]), backward(cuda, given))


@pytest.mark.parametrize("module", ["token_maxima", "token_maxima_backward"])
def test_offsets_inside_a_tile_of_more_than_32_bits(module, needs_emulated, monkeypatch):
    needs_emulated("triton")
    from emulated_cuda import EmulatedCuda

    cuda = EmulatedCuda("triton", 80)
    arguments = problem(2, 70, 3, 18, 32, dtype=BRAIN)
    results = forward(cuda, arguments)
    gradient, _ = backward_arguments(arguments, *results[2:4])
    expected = [*results, backward(cuda, gradient)]
    monkeypatch.setattr(f"mlip_kernels.triton.contrastive.{module}.span", lambda *_: 2**31)
    for actual, wanted in zip([*forward(cuda, arguments), backward(cuda, gradient)], expected, strict=True):
        assert_identical(actual, wanted)


@on((80, SINGLE))
def test_empty_batches(cuda, dtype):
    for shape in ((0, 3, 2, 4, 5), (2, 3, 0, 4, 5)):
        arguments = problem(*shape, dtype=dtype, masked=False)
        results = forward(cuda, arguments)
        for actual, expected in zip(results, reference.token_maxima(*arguments, True, True), strict=True):
            assert_identical(actual, expected)
        for given in backward_arguments(arguments, *results[2:4]):
            assert_identical(backward(cuda, given), torch.zeros_like(reference.token_maxima_backward(*given)))


@on((80, SINGLE), (90, BRAIN))
def test_what_stands_in_masked_tokens_is_not_used(cuda, dtype):
    arguments = problem(*ODD, dtype=dtype)
    spoilt = list(arguments)
    for side in (0, 1):
        spoilt[side] = arguments[side].masked_fill(~arguments[side + 2][..., None], float("nan"))
    results = forward(cuda, arguments)
    for actual, expected in zip(forward(cuda, spoilt), results, strict=True):
        assert_identical(actual, expected)
    for given, same in zip(*(backward_arguments(one, *results[2:4]) for one in (spoilt, arguments)), strict=True):
        assert_identical(backward(cuda, given), backward(cuda, same))


@pytest.mark.parametrize("shape", [ODD, MANY_ROWS], ids=str)
@on((90, BRAIN))
def test_a_token_that_is_nan_wins_as_in_pytorch(cuda, shape, dtype):
    arguments = problem(*shape, dtype=dtype, masked=False)
    arguments[0][1, 3, 2] = arguments[0][1, 40, 2] = arguments[1][2, 18] = float("nan")
    for actual, expected in zip(forward(cuda, arguments), reference.token_maxima(*arguments, True, True), strict=True):
        if actual.is_floating_point():
            assert torch.equal(actual.isnan(), expected.isnan())
        else:
            assert_identical(actual, expected)


@on((90, BRAIN))
def test_the_public_function_and_its_gradients(cuda, dtype):
    images, texts, image_mask, text_mask, *weights = problem(*ODD, dtype=dtype, integers=False)

    def results(put=torch.Tensor.detach, to=torch.Tensor.clone):
        leaves = [put(to(t)).requires_grad_() for t in (images, texts, *weights)]
        names = ("image_mask", "text_mask", "image_weight", "text_weight")
        options = dict(zip(names, (put(image_mask), put(text_mask), *leaves[2:]), strict=True))
        logits = token_logits(*leaves[:2], **options, scale=3.0)
        return [*logits, *torch.autograd.grad([x.square().sum() for x in logits], leaves)]

    with cuda:
        found = [t.cpu() for t in results(cuda.put)]
    with use_reference():
        baseline, truth = results(), results(to=torch.Tensor.double)
    for three in zip(found, baseline, truth, strict=True):
        assert_as_accurate(*three)
    assert sorted(cuda.operators) == ["contrastive_token_maxima", *["contrastive_token_maxima_backward"] * 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_not_computed(backend, needs_emulated):
    needs_emulated(backend)
    from emulated_cuda import EmulatedCuda

    arguments = problem(1, 49, 8, 77, 32, dtype=BRAIN, masked=False)
    multiply_adds = []
    for length in (77, 20):
        arguments[3] = (torch.arange(77) < length).expand(8, 77)
        device = EmulatedCuda(backend, 80)
        best_text, best_image = forward(device, arguments, True, False)[2:4]
        backward(device, backward_arguments(arguments, best_text, best_image)[0])
        multiply_adds.append([launch.statistics.matrix_macs for launch in device.launches])
    for padded, whole in zip(*reversed(multiply_adds), strict=True):
        assert padded <= whole / 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_order_of_the_warps_changes_a_bit(backend, needs_emulated):
    needs_emulated(backend)
    from emulated_cuda import EmulatedCuda

    arguments = problem(*MANY_ROWS, dtype=BRAIN, integers=False)
    both = []
    for schedule in ("round_robin", "random"):
        device = EmulatedCuda(backend, 90, schedule=schedule, seed=1)
        results = forward(device, arguments)
        both.append([*results, *(backward(device, given) for given in backward_arguments(arguments, *results[2:4]))])
    for one, other in zip(*both, strict=True):
        assert_identical(one, other)
