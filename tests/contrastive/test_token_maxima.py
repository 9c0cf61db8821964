"""The registered primitives of the contrastive family: operators as such, traced, exported, transformed."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.nn.functional import normalize

from mlip_kernels import token_logits, use_reference
from mlip_kernels.contrastive import plain as reference
from mlip_kernels.testing import assert_close, assert_identical, permuted

FORWARD = torch.ops.mlip_kernels.contrastive_token_maxima.default
BACKWARD = torch.ops.mlip_kernels.contrastive_token_maxima_backward.default


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(b, n, c, m, d, *, masked=True, dtype=torch.float32):
    """Arguments of the forward operator, without what is to be kept."""
    images, texts = (
        normalize(random(b, n, d, dtype=dtype), dim=-1),
        normalize(random(c, m, d, seed=1, dtype=dtype), dim=-1),
    )
    masks = [random(b, n, seed=2) < 0.5, random(c, m, seed=3) < 0.5] if masked else [None, None]
    weights = [random(b, n, seed=4).abs(), random(c, m, seed=5).abs()]
    pairs = zip((images, texts), masks, weights, strict=True)
    return [images, texts, *masks, *(reference.normalized_weights(*pair) for pair in pairs)]


def backward_arguments(arguments, best_text, best_image, seed=6):
    """Arguments of the backward operator for the images and for the texts."""
    images, texts, image_mask, text_mask, image_normalized_weight, text_normalized_weight = arguments
    to_images, to_texts = (random(a.shape[0], b.shape[0], seed=seed) for a, b in ((images, texts), (texts, images)))
    to_images, to_texts = to_images.to(image_normalized_weight.dtype), to_texts.to(image_normalized_weight.dtype)
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


def test_what_is_not_wanted_is_not_kept():
    arguments = problem(3, 5, 4, 7, 6)
    everything = FORWARD(*arguments, True, True)
    assert [t.numel() for t in everything] == [12, 12, 60, 84, 60, 84]
    for keep_best, keep_maxima in ((True, False), (False, True), (False, False)):
        kept = (True, True, keep_best, keep_best, keep_maxima, keep_maxima)
        for actual, expected, wanted in zip(FORWARD(*arguments, keep_best, keep_maxima), everything, kept, strict=True):
            assert_identical(actual, expected if wanted else expected.new_empty(0))


def test_a_gradient_that_nothing_was_kept_for_is_refused():
    images, texts, *masks, image_weight, _ = problem(2, 3, 2, 3, 4)
    operator = torch.ops.mlip_kernels.token_logits.default
    rest = None, None, 1.0, 0.0
    with pytest.raises(ValueError, match="keep_best"):
        operator(images.requires_grad_(), texts, *masks, None, None, *rest, False, False, False)
    with pytest.raises(ValueError, match="keep_maxima"):
        operator(images.detach(), texts, *masks, image_weight.requires_grad_(), None, *rest, True, False, False)


@pytest.mark.parametrize(("count", "dtype"), [(256, torch.uint8), (257, torch.int16)], ids=str)
def test_maps_are_as_small_as_the_number_of_tokens_allows(count, dtype):
    images = torch.zeros(1, 3, 2)
    texts = torch.zeros(1, count, 2)
    images[:, :, 0] = 1
    texts[:, -1, 0] = 1
    arguments = [images, texts, None, None, torch.full((1, 3), 1 / 3), torch.full((1, count), 1 / count)]
    best_text, best_image = FORWARD(*arguments, True, False)[2:4]
    assert_identical(best_text, torch.full((1, 1, 3), count - 1).to(dtype))
    assert_identical(best_image, torch.zeros(1, 1, count, dtype=torch.uint8))
    swapped = [arguments[position] for position in (1, 0, 2, 3, 5, 4)]
    assert_identical(FORWARD(*swapped, True, False)[3], torch.full((1, 1, 3), count - 1).to(dtype))


@pytest.mark.parametrize("learnable", [False, True], ids=["inference", "training"])
def test_exports_with_batches_of_any_size(learnable):
    class Logits(torch.nn.Module):
        def forward(self, images, texts, mask):
            return token_logits(images, texts, text_mask=mask, scale=2.0)

    images, texts, mask = random(3, 4, 5).requires_grad_(learnable), random(2, 6, 5, seed=1), random(2, 6, seed=2) < 0.5
    sizes = [{0: torch.export.Dim("images")}, {0: torch.export.Dim("texts")}, {0: torch.export.Dim("texts")}]
    with torch.set_grad_enabled(learnable):
        program = torch.export.export(Logits(), (images, texts, mask), dynamic_shapes=sizes)
    assert any("mlip_kernels.token_logits" in str(node.target) for node in program.graph.nodes)
    more = random(7, 4, 5, seed=3), random(5, 6, 5, seed=4), random(5, 6, seed=5) < 0.5
    for actual, expected in zip(program.module()(*more), Logits()(*more), strict=True):
        assert_identical(actual, expected)


def test_compiles_to_the_operators_for_shapes_that_change():
    called = set()

    def record(graph, _):
        called.update(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    def loss(images, texts, weight, mask):
        return sum(x.square().sum() for x in token_logits(images, texts, image_weight=weight, text_mask=mask))

    compiled = torch.compile(loss, backend=aot_autograd(fw_compiler=record), fullgraph=True, dynamic=True)
    for b, n, c, m in ((3, 4, 2, 6), (5, 7, 4, 3)):
        arguments = random(b, n, 5), random(c, m, 5, seed=1), random(b, n, seed=2).abs()
        mask = random(c, m, seed=3) < 0.5
        found = []
        for function in (compiled, loss):
            leaves = [t.clone().requires_grad_() for t in arguments]
            found.append(torch.autograd.grad(function(*leaves, mask), leaves))
        for actual, expected in zip(*found, strict=True):
            assert_close(actual, expected)
    operators = torch.ops.mlip_kernels
    assert called >= {operators.token_logits.default, operators.token_logits_backward.default}


def test_the_reference_of_the_primitives_is_that_of_autograd():
    arguments = problem(4, 5, 3, 7, 6, dtype=torch.float64)
    leaves = [arguments[0].requires_grad_(), arguments[1].requires_grad_()]
    with use_reference():
        per_image, per_text, best_text, best_image, *_ = reference.token_maxima(*arguments, True, False)
    own, other = backward_arguments(arguments, best_text, best_image)
    expected = torch.autograd.grad([per_image, per_text], leaves, own[:2])
    for actual, wanted in zip((reference.token_maxima_backward(*a) for a in (own, other)), expected, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, permuted])
def test_opcheck(layout, masked):
    arguments = [None if t is None else layout(t) for t in problem(3, 5, 4, 7, 6, masked=masked)]
    images, texts, *masks, image_weight, text_weight = arguments
    torch.library.opcheck(FORWARD, (*arguments, False, False), test_utils="test_schema")
    for given in backward_arguments(arguments, *FORWARD(*arguments, True, False)[2:4]):
        torch.library.opcheck(BACKWARD, given, test_utils="test_schema")
    learned = [leaf.requires_grad_() for leaf in (images, texts, image_weight, text_weight, torch.tensor(2.0))]
    scaled = (*learned[:2], *masks, *learned[2:], None, 1.0, 0.5, True, True, True)
    torch.library.opcheck(torch.ops.mlip_kernels.token_logits.default, scaled)
    plain = (images.detach(), texts.detach(), *masks, None, None, None, None, 2.0, 0.0, False, False, False)
    torch.library.opcheck(torch.ops.mlip_kernels.token_logits.default, plain)
