"""What is particular to the CUDA C++ kernels of the contrastive family: how they cut problems, and planted faults. What
holds for both backends is in test_gpu_contrastive.py.

Tokens of small integers have exact similarities in every dtype, full of ties: winners must then be those of the
reference, one by one.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import mlip_kernels
from mlip_kernels.contrastive import plain as reference
from mlip_kernels.testing import assert_as_accurate, assert_identical

FORWARD = torch.ops.mlip_kernels.contrastive_token_maxima.default
BACKWARD = torch.ops.mlip_kernels.contrastive_token_maxima_backward.default
SOURCES = Path(mlip_kernels.__file__).parents[1] / "csrc" / "cuda" / "contrastive"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ARCHITECTURES = (80, 90)
SHAPES = (  # B, N, C, M, D
    (1, 1, 1, 1, 1),
    (2, 49, 3, 77, 64),
    (3, 17, 70, 2, 17),
    (1, 70, 2, 33, 129),
)


@pytest.fixture(params=ARCHITECTURES, ids="sm{}".format)
def cuda(request, needs_emulated):
    needs_emulated("cuda")
    from emulated_cuda import EmulatedCuda

    return EmulatedCuda("cuda", request.param)


def problem(b, n, c, m, d, *, dtype=torch.float32, masked=False, integers=False):
    """Arguments of the forward operator, without what is to be kept; of masked sides, one row has no real token."""
    random = torch.Generator().manual_seed(b + n + c + m + d)

    def tokens(batch, count):
        if integers:
            return torch.randint(-2, 3, (batch, count, d), generator=random).to(dtype)
        return torch.nn.functional.normalize(torch.randn(batch, count, d, generator=random), dim=-1).to(dtype)

    def mask(batch, count):
        real = torch.rand(batch, count, generator=random) < 0.6
        real[batch // 2] = False
        return (real.to(torch.uint8) * 254).view(torch.bool)  # any byte but 0 is true

    sides = tokens(b, n), tokens(c, m)
    masks = [mask(b, n), mask(c, m)] if masked else [None, None]
    weights = (0.5 + torch.rand(shape, generator=random) for shape in ((b, n), (c, m)))
    return [*sides, *masks, *(reference.normalized_weights(*one) for one in zip(sides, masks, weights, strict=True))]


def backward_arguments(arguments, best_text, best_image):
    """Arguments of the backward operator, for the images and for the texts."""
    images, texts, image_mask, text_mask, image_normalized_weight, text_normalized_weight = arguments
    random = torch.Generator().manual_seed(1)
    to_images, to_texts = (
        torch.randn(shape, generator=random) for shape in (best_text.shape[:2], best_image.shape[1::-1])
    )
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


def double(arguments):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]


def on(cuda, operator, *arguments):
    with cuda:
        return operator(*arguments)


def assert_same_winners(actual, expected, own, other):
    """Those of real tokens are the same; where the other side has no real token, the winner is masked."""
    assert actual.dtype == expected.dtype
    own = torch.ones_like(expected[:, 0], dtype=torch.bool) if own is None else own
    real = own[:, None].expand(expected.shape)
    if other is not None:
        there = other.any(1)
        real = real & there[None, :, None]
        found = torch.gather(other[~there].expand(actual.shape[0], -1, -1), 2, actual[:, ~there].long())
        assert not found.any()
    assert torch.equal(actual[real], expected[real])


def assert_exact(cuda, arguments):
    found, expected = on(cuda, FORWARD, *arguments, True, True), reference.token_maxima(*arguments, True, True)
    truth = reference.token_maxima(*double(arguments), True, True)
    for position in (0, 1, 4, 5):
        assert_as_accurate(found[position], expected[position], truth[position])
    image_mask, text_mask = arguments[2:4]
    assert_same_winners(found[2], expected[2], image_mask, text_mask)
    assert_same_winners(found[3].transpose(0, 1), expected[3].transpose(0, 1), text_mask, image_mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_similarities_have_the_winners_of_the_reference(cuda, shape, dtype):
    assert_exact(cuda, problem(*shape, dtype=dtype, masked=True, integers=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maxima_are_as_accurate_as_those_of_the_reference(cuda, dtype):
    arguments = problem(1, 20, 2, 30, 300, dtype=dtype)
    found, baseline, truth = (
        on(cuda, FORWARD, *arguments, True, True),
        reference.token_maxima(*arguments, True, True),
        reference.token_maxima(*double(arguments), True, True),
    )
    for position in (0, 1, 4, 5):
        assert_as_accurate(found[position], baseline[position], truth[position])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 2, 257, 8)], ids=str)
def test_gradients_are_as_accurate_as_those_of_the_reference(cuda, shape, dtype):
    arguments = problem(*shape, dtype=dtype, masked=True)
    for given in backward_arguments(arguments, *reference.token_maxima(*arguments, True, False)[2:4]):
        found = on(cuda, BACKWARD, *given)
        assert found.dtype == dtype
        truth = reference.token_maxima_backward(*double(given))
        assert_as_accurate(found, reference.token_maxima_backward(*given), truth)
        assert not found[~given[3]].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_tokens_that_are_not_finite_spoil_their_own_pairs_alone(cuda, value):
    arguments = problem(3, 17, 4, 19, 6, masked=True)
    arguments[2][0], arguments[3][0] = True, True
    arguments[2][2, 5] = arguments[3][3, 7] = False
    clean = on(cuda, FORWARD, *arguments, True, True)
    arguments[0][2, 5] = arguments[1][3, 7] = value  # masked: harmless
    for found, wanted in zip(on(cuda, FORWARD, *arguments, True, True), clean, strict=True):
        assert_identical(found, wanted)
    arguments[0][0, 3, 2] = value
    per_image, per_text, _, best_image, *_ = on(cuda, FORWARD, *arguments, True, True)
    there = arguments[3].any(1)
    assert not per_image[0, there].isfinite().any()
    assert not per_text[there, 0].isfinite().any()
    assert (best_image[0][arguments[3]] == 3).all()
    assert_identical(per_image[1:], clean[0][1:])
    assert_identical(per_text[:, 1:], clean[1][:, 1:])


def test_a_pair_does_not_depend_on_the_batch_around_it(cuda):
    arguments = problem(3, 17, 40, 19, 24, masked=True)
    whole = on(cuda, FORWARD, *arguments, True, True)
    part = on(cuda, FORWARD, *(t[1:3] if i % 2 == 0 else t[21:24] for i, t in enumerate(arguments)), True, True)
    for found, expected in zip(part[2:], whole[2:], strict=True):
        assert_identical(found, expected[1:3, 21:24].contiguous())
    assert_identical(part[0], whole[0][1:3, 21:24].contiguous())
    assert_identical(part[1], whole[1][21:24, 1:3].contiguous())


def test_many_tokens_in_little_shared_memory(needs_emulated):
    needs_emulated("cuda")
    from emulated_cuda import EmulatedCuda

    small, large = (EmulatedCuda("cuda", 80, sized_as=arch) for arch in (75, 90))
    for n, m in ((2048, 70), (70, 2048)):
        arguments = problem(1, n, 1, m, 136, masked=True, integers=True)
        arguments[2][0, ::2] = arguments[3][0, 1::3] = True
        assert_exact(small, arguments)
        results = (on(device, FORWARD, *arguments, True, True) for device in (small, large))
        for found, wanted in zip(*results, strict=True):
            assert_identical(found, wanted)
        assert small.launches[-1].shared < large.launches[-1].shared


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_tensor_cores_and_copies_in_the_background(dtype, needs_emulated, request):
    """What is compiled for sm_75, whose PTX the emulator does not take, compiled for sm_80."""
    needs_emulated("cuda")
    from emulated_cuda import EmulatedCuda
    from emulated_cuda.cuda_library import inlined

    original = SOURCES / "token_maxima.cu"
    old = inlined(original).replace("__CUDA_ARCH__ >= 800", "false")
    file = request.config.cache.mkdir("contrastive_without_tensor_cores") / original.name
    if not file.exists() or file.read_text(encoding="utf-8") != old:
        file.write_text(old, encoding="utf-8")
    cuda = EmulatedCuda("cuda", 80, sources={original: file})
    assert_exact(cuda, problem(2, 49, 3, 77, 40, dtype=dtype, masked=True, integers=True))
    assert not any("mma" in opcode or "cp.async.cg" in opcode for opcode in cuda.launches[0].opcodes)


WRONG = "wrong result"
MAXIMA, GRADIENT = "token_maxima", "token_maxima_backward"


@dataclass(frozen=True)
class Mutation:
    """``after`` in the place of ``before``, in a kernel, is seen as ``caught``."""

    name: str
    kernel: str
    before: str
    after: str
    caught: str


MUTATIONS = (
    Mutation("no barrier behind the tile", MAXIMA, "__syncthreads();  // the tile is there", "", "shared_race"),
    Mutation("texts without mask", MAXIMA, "find_valid_indices(p.texts.mask", "find_valid_indices(nullptr", WRONG),
    Mutation("sums start again", MAXIMA, "shared.text_sum[1 - next]", "0.0f", WRONG),
    Mutation("rows start again", MAXIMA, "real && goes_on ? state.maxima[row]", "false ? 0.0f", WRONG),
    Mutation("lists replaced too early", GRADIENT, "__syncthreads();  // the lists may be replaced", "", "shared_race"),
    Mutation("winners without mask", GRADIENT, " && (other_mask == nullptr || other_mask[argmax])", "", WRONG),
    Mutation("one sum for all", GRADIENT, "term.row_and_token % WARPS == warp", "true", "shared_race"),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name.replace(" ", "_"))
def test_planted_faults_are_caught(mutation, needs_emulated, request):
    needs_emulated("cuda")
    from emulated_cuda import EmulatedCuda
    from ptx_emulator import EmulatorError

    original = SOURCES / f"{mutation.kernel}.cu"
    source = original.read_text(encoding="utf-8")
    assert source.count(mutation.before) == 1, f"{mutation.name}: not once in the source"
    folder = request.config.cache.mkdir(f"contrastive_mutation_{MUTATIONS.index(mutation)}")
    file, mutated = folder / original.name, source.replace(mutation.before, mutation.after)
    if not file.exists() or file.read_text(encoding="utf-8") != mutated:
        file.write_text(mutated, encoding="utf-8")
    cuda = EmulatedCuda("cuda", 80, sources={original: file})
    arguments = problem(2, 40, 9, 77, 24, masked=True, integers=True)
    arguments[0].add_(3), arguments[1].neg_().sub_(3)  # similarities are negative: what is masked would win
    try:
        if mutation.kernel == MAXIMA:
            assert_exact(cuda, arguments)
        else:
            given, _ = backward_arguments(arguments, *reference.token_maxima(*arguments, True, False)[2:4])
            truth = reference.token_maxima_backward(*double(given))
            assert_as_accurate(on(cuda, BACKWARD, *given), reference.token_maxima_backward(*given), truth)
        outcome = set()
    except EmulatorError as failure:
        outcome = failure.kinds
    except AssertionError:
        outcome = {WRONG}
    assert mutation.caught in outcome
