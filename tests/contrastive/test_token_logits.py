"""Values of `token_logits`: the definition, hard input, dtypes, determinism, tracing, memory."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from mlip_kernels.contrastive import plain as reference
from mlip_kernels.contrastive import token_logits
from mlip_kernels.testing import assert_as_accurate, assert_close, assert_identical

OPTIONS = ("image_mask", "text_mask", "image_weight", "text_weight")
SHAPES = (  # B, N, C, M, D
    (1, 1, 1, 1, 1),
    (3, 5, 4, 7, 6),
    (4, 7, 2, 1, 3),
    (2, 1, 3, 9, 17),
    (0, 3, 2, 4, 5),
    (3, 2, 0, 4, 5),
)


def inputs(shape, seed=0, dtype=torch.float64):
    b, n, c, m, d = shape
    random = torch.Generator().manual_seed(seed)
    tokens = [normalize(torch.randn(s, generator=random, dtype=torch.float64), dim=-1) for s in ((b, n, d), (c, m, d))]
    options = {
        "image_mask": torch.rand(b, n, generator=random) < 0.7,
        "text_mask": torch.rand(c, m, generator=random) < 0.7,
        "image_weight": torch.randint(0, 4, (b, n), generator=random).to(dtype),
        "text_weight": torch.rand(c, m, generator=random).to(dtype),
    }
    return [t.to(dtype) for t in tokens], options


def one_direction(rows, columns, row_mask, column_mask, row_weight, scale, bias):
    """The four loops: rows i, columns j, tokens n of i, tokens m of j."""
    logits = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for i in range(len(rows)):
        for j in range(len(columns)):
            total = weighted = 0.0
            for n in range(rows.shape[1]):
                best = -math.inf
                for m in range(columns.shape[1]):
                    if column_mask is None or column_mask[j, m]:
                        best = max(best, float(rows[i, n] @ columns[j, m]))
                if row_mask is None or row_mask[i, n]:
                    weight = 1.0 if row_weight is None else float(row_weight[i, n])
                    total += weight
                    weighted += weight * best if best > -math.inf else 0.0
            logits[i, j] = scale * (weighted / total if total else 0.0) + bias
    return logits


def definition(image, text, image_mask=None, text_mask=None, image_weight=None, text_weight=None, scale=1.0, bias=0.0):
    per_image = one_direction(image, text, image_mask, text_mask, image_weight, scale, bias)
    return per_image, one_direction(text, image, text_mask, image_mask, text_weight, scale, bias)


def assert_is_definition(image, text, **options):
    for actual, expected in zip(token_logits(image, text, **options), definition(image, text, **options), strict=True):
        assert actual.is_contiguous()
        assert_close(actual, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("given", [(), OPTIONS[:1], OPTIONS[1:2], OPTIONS[2:], OPTIONS], ids="-".join)
def test_is_the_four_loop_definition(shape, given):
    tokens, options = inputs(shape)
    assert_is_definition(*tokens, **{name: options[name] for name in given}, scale=7.5, bias=-3.0)


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_masked_tokens_lose_against_negative_similarities(size):
    (image, text), options = inputs((3, 5, 4, 6, 8), seed=1)
    image, text = size * image.abs(), -text.abs()
    assert float(torch.einsum("bnd,cmd->bcnm", image, text).max()) < 0
    assert_is_definition(image, text, **options)


def test_all_masked_and_weightless_sides_give_the_bias():
    (image, text), _ = inputs((3, 4, 3, 5, 6))
    image_mask, text_mask = torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 5, dtype=torch.bool)
    image_mask[1], text_mask[2] = False, False
    image_weight, text_weight = torch.ones(3, 4), torch.ones(3, 5)
    image_weight[0] = 0
    options = {
        "image_mask": image_mask,
        "text_mask": text_mask,
        "image_weight": image_weight,
        "text_weight": text_weight,
    }
    assert_is_definition(image, text, **options, scale=3.0, bias=0.25)
    per_image, per_text = token_logits(image, text, **options, scale=3.0, bias=0.25)
    for masked in (per_image[:2], per_image[:, 2], per_text[:, 1], per_text[2]):
        assert_identical(masked, torch.full_like(masked, 0.25))
    assert not (per_text[:2, 0] == 0.25).any(), "an image whose weights are 0 still has tokens to be found"
    assert_identical(token_logits(image, text, **options)[0][1], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("garbage", [1e30, math.nan, math.inf])
def test_what_stands_in_a_masked_token_is_never_used(garbage):
    (image, text), options = inputs((3, 5, 4, 6, 8))
    expected = token_logits(image, text, **options)
    for values, mask in ((image, "image_mask"), (text, "text_mask")):
        values[~options[mask]] = garbage
        options[mask.replace("mask", "weight")][~options[mask]] = garbage
    for actual, wanted in zip(token_logits(image, text, **options), expected, strict=True):
        assert_identical(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_pytorch(dtype):
    (image, text), options = inputs((6, 49, 5, 24, 64), dtype=dtype)
    options = {name: options[name] for name in ("text_mask", "image_weight")}
    truth = token_logits(image.double(), text.double(), **options)
    similarity = torch.einsum("bnd,cmd->bcnm", image, text)
    best_text = similarity.masked_fill(~options["text_mask"][:, None], -torch.inf).amax(3)
    best_image = similarity.amax(2).masked_fill(~options["text_mask"], 0)
    weight = options["image_weight"][:, None]
    baseline = (
        (best_text * weight).sum(2) / weight.sum(2),
        (best_image.sum(2) / options["text_mask"].sum(1).to(dtype)).t(),
    )
    for actual, same_dtype, exact in zip(token_logits(image, text, **options), baseline, truth, strict=True):
        assert actual.dtype == torch.float32
        assert_as_accurate(actual, same_dtype, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_are_multiplied_in_float32(dtype):
    (image, text), _ = inputs((5, 9, 4, 8, 32), dtype=dtype)
    for actual, expected in zip(token_logits(image, text), token_logits(image.float(), text.float()), strict=True):
        assert_close(actual, expected)


def test_autocast_lets_dtypes_meet():
    (image, text), _ = inputs((5, 9, 4, 8, 32), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logits(image, text.bfloat16())
    for one, other in zip(found, token_logits(image, text.bfloat16().float()), strict=True):
        assert_identical(one, other)


@pytest.mark.parametrize("elements", [1, 150, 400])
def test_chunks_do_not_show(monkeypatch, elements):
    (image, text), options = inputs((7, 5, 4, 6, 8))
    expected = token_logits(image, text, **options)
    monkeypatch.setattr(reference, "SIMILARITIES_AT_A_TIME", elements)
    for actual, wanted in zip(token_logits(image, text, **options), expected, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("weighted", [False, True], ids=["tokens", "tokens and weights"])
def test_saves_no_more_for_backward_than_documented(weighted):
    b, n, c, m, d = 16, 20, 12, 10, 8
    (image, text), options = inputs((b, n, c, m, d), dtype=torch.float32)
    leaves = [image, text, *(options[name] for name in OPTIONS[2:] if weighted)]
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    for leaf in leaves:
        leaf.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = token_logits(image, text, **options)
    pairs = b * c * (n + m) * (1 + 4 * weighted)
    around_tokens = sum(t.numel() * t.element_size() for t in (image, text)) + 8 * 4 * (b * n + c * m)
    assert sum(saved.values()) <= pairs + around_tokens
    assert all(x.requires_grad for x in logits)


@pytest.mark.parametrize("given", [(), OPTIONS], ids=["plain", "masks and weights"])
def test_traces_as_one_graph(given):
    (image, text), options = inputs((5, 6, 4, 7, 8), dtype=torch.float32)
    options = {name: options[name] for name in given}
    leaves = [image, text, torch.tensor(3.0), torch.tensor(-1.0)]

    def results(function):
        arguments = [leaf.detach().requires_grad_() for leaf in leaves]
        logits = function(*arguments)
        return [*logits, *torch.autograd.grad([x.square().sum() for x in logits], arguments)]

    def call(image, text, scale, bias):
        return token_logits(image, text, **options, scale=scale, bias=bias)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(results(compiled), results(call), strict=True):
        assert_close(actual, expected)
    with torch.autocast("cpu", torch.bfloat16):
        for actual, expected in zip(compiled(*leaves), call(*leaves), strict=True):
            assert_close(actual, expected)


GOOD = {"image_tokens": torch.zeros(2, 3, 4), "text_tokens": torch.zeros(5, 6, 4)}


def test_float64_does_not_meet_float32_even_under_autocast():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="text_tokens"):
        token_logits(GOOD["image_tokens"], GOOD["text_tokens"].double())
