"""Gradients of `token_logits`: finite differences, ties, masks, scale and bias, half precision."""

import pytest
import torch
from torch.nn.functional import normalize

from mlip_kernels.contrastive import token_logits
from mlip_kernels.testing import assert_as_accurate, assert_close, assert_identical, gradients


def inputs(b=3, n=3, c=2, m=4, d=2, dtype=torch.float64):
    random = torch.Generator().manual_seed(7)
    image = normalize(torch.randn(b, n, d, generator=random, dtype=torch.float64), dim=-1).to(dtype)
    text = normalize(torch.randn(c, m, d, generator=random, dtype=torch.float64), dim=-1).to(dtype)
    masks = {
        "image_mask": torch.rand(b, n, generator=random) < 0.7,
        "text_mask": torch.rand(c, m, generator=random) < 0.7,
    }
    masks["image_mask"][1] = False
    weights = [torch.rand(b, n, generator=random).to(dtype), torch.rand(c, m, generator=random).to(dtype)]
    return [image, text, *weights], masks


def test_a_gradient_of_one_argument_from_one_direction_is_part_of_all():
    tensors, masks = inputs()
    names = ("image_tokens", "text_tokens", "image_weight", "text_weight")
    for direction in (0, 1):

        def call(*values, direction=direction):
            return token_logits(**dict(zip(names, values, strict=True)), **masks)[direction]

        for name, wanted in zip(names, gradients(call, tensors), strict=True):

            def partial(value, name=name, call=call):
                return call(*(value if n == name else t for n, t in zip(names, tensors, strict=True)))

            (found,) = gradients(partial, [dict(zip(names, tensors, strict=True))[name]])
            assert_identical(found, wanted)


def test_the_first_of_equal_tokens_gets_the_whole_gradient():
    image = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]], requires_grad=True)
    text = torch.tensor([[[-1.0, -1.0], [2.0, 3.0], [2.0, 3.0]]], requires_grad=True)
    per_image, per_text = token_logits(image, text)
    (image_gradient,) = torch.autograd.grad(per_text.sum(), image, retain_graph=True)
    (text_gradient,) = torch.autograd.grad(per_image.sum(), text)
    # Text tokens 1 and 2 find image token 1; text token 0 finds image tokens 0, 1 and 2 equally similar.
    assert_close(image_gradient, torch.tensor([[[-1.0, -1.0], [4.0, 6.0], [0.0, 0.0]]]) / 3)
    assert_close(text_gradient, torch.tensor([[[0.0, 0.0], [2.0, 1.0], [0.0, 0.0]]]) / 3)


def test_ties_skip_masked_tokens():
    image = torch.ones(1, 2, 3)
    text = torch.ones(1, 4, 3, requires_grad=True)
    per_image, _ = token_logits(image, text, text_mask=torch.tensor([[False, True, False, True]]))
    (gradient,) = torch.autograd.grad(per_image.sum(), text)
    assert_identical(gradient, torch.tensor([[0.0, 1.0, 0.0, 0.0]])[:, :, None].expand(1, 4, 3).contiguous())


@pytest.mark.parametrize("garbage", [0.0, torch.nan, torch.inf])
def test_masked_tokens_get_no_gradient_and_disturb_none(garbage):
    tensors, masks = inputs()

    def call(image, text, image_weight, text_weight):
        return token_logits(image, text, image_weight=image_weight, text_weight=text_weight, **masks)

    expected = gradients(call, tensors)
    for value, mask in zip(tensors, ("image_mask", "text_mask") * 2, strict=True):
        value[~masks[mask]] = garbage
    for actual, wanted, mask in zip(gradients(call, tensors), expected, ("image_mask", "text_mask") * 2, strict=True):
        assert_identical(actual, wanted)
        assert_identical(actual[~masks[mask]], torch.zeros_like(actual[~masks[mask]]))


def test_a_side_without_tokens_or_weight_passes_no_gradient():
    (image, text, image_weight, text_weight), _ = inputs()
    masked = torch.zeros(text.shape[:2], dtype=torch.bool)
    scale, bias = torch.tensor(2.0), torch.tensor(0.5)

    def all_texts_masked(image, text, image_weight, text_weight, scale, bias):
        options = {"image_weight": image_weight, "text_weight": text_weight, "scale": scale, "bias": bias}
        return token_logits(image, text, text_mask=masked, **options)

    *found, bias_gradient = gradients(all_texts_masked, [image, text, image_weight, text_weight, scale, bias])
    for gradient in found:
        assert_identical(gradient, torch.zeros_like(gradient))
    assert float(bias_gradient.abs()) > 0

    def weightless(image, text, image_weight):
        return token_logits(image, text, image_weight=image_weight)[0]

    for gradient in gradients(weightless, [image, text, torch.zeros_like(image_weight)]):
        assert_identical(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "one element"])
def test_scale_and_bias_are_learnable(shape):
    (image, text, *_), _ = inputs(dtype=torch.float32)
    plain = token_logits(image, text)
    scale, bias = torch.full(shape, 14.0, requires_grad=True), torch.full(shape, -10.0, requires_grad=True)
    logits = token_logits(image, text, scale=scale, bias=bias)
    for actual, mean, number in zip(logits, plain, token_logits(image, text, scale=14.0, bias=-10.0), strict=True):
        assert_identical(actual, mean * 14 - 10)
        assert_identical(actual, number)
    found = torch.autograd.grad(logits[0].sum() + 2 * logits[1].sum(), [scale, bias])
    assert_close(found[0], (plain[0].sum() + 2 * plain[1].sum()).reshape(shape))
    assert_close(found[1], torch.full(shape, 3.0 * plain[0].numel()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_error_is_at_most_twice_that_of_pytorch(dtype):
    (image, text, image_weight, _), _ = inputs(6, 49, 5, 24, 64, dtype)

    def ours(image, text, image_weight):
        return token_logits(image, text, image_weight=image_weight, scale=10.0)

    def pytorch(image, text, weight):
        similarity = torch.einsum("bnd,cmd->bcnm", image, text)
        per_image = (similarity.max(3).values * weight[:, None]).sum(2) / weight.sum(1)[:, None]
        return 10 * per_image, 10 * similarity.max(2).values.mean(2).t()

    arguments = [image, text, image_weight]
    truth = gradients(ours, [t.double() for t in arguments])
    found = zip(gradients(ours, arguments), gradients(pytorch, arguments), truth, strict=True)
    for actual, baseline, exact in found:
        assert actual.dtype == dtype
        assert_as_accurate(actual, baseline, exact)


@pytest.mark.parametrize("batches", [(0, 3), (3, 0), (0, 0)], ids=str)
def test_empty_batches_have_empty_or_zero_gradients(batches):
    image = torch.randn(batches[0], 4, 5, requires_grad=True)
    text = torch.randn(batches[1], 6, 5, requires_grad=True)
    found = torch.autograd.grad([x.sum() for x in token_logits(image, text)], [image, text])
    for gradient, leaf in zip(found, (image, text), strict=True):
        assert_identical(gradient, torch.zeros_like(leaf))
