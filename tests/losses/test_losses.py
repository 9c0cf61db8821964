"""The losses on one process: parity with open_clip, the definition on tokens, bad input, tracing."""

import inspect
import math
import warnings

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from mlip_kernels.contrastive import token_logits
from mlip_kernels.nn.losses import ClipLoss, SigLipLoss, TokenContrastiveLoss, gather
from mlip_kernels.testing import assert_as_accurate, assert_close, assert_identical, gradients

open_clip_loss = pytest.importorskip("open_clip.loss", reason="parity needs open_clip_torch")


def features(batch=6, width=16, dtype=torch.float64):
    random = torch.Generator().manual_seed(3)
    drawn = torch.randn(2, batch, width, generator=random, dtype=torch.float64)
    return [*normalize(drawn, dim=-1).to(dtype), torch.tensor(14.0, dtype=dtype), torch.tensor(-10.0, dtype=dtype)]


def tokens(batch=4, dtype=torch.float64):
    random = torch.Generator().manual_seed(4)
    pair = [normalize(torch.randn(batch, n, 8, generator=random, dtype=torch.float64), dim=-1) for n in (7, 5)]
    options = {
        "image_mask": torch.rand(batch, 7, generator=random) < 0.8,
        "text_mask": torch.rand(batch, 5, generator=random) < 0.6,
        "image_weight": torch.rand(batch, 7, generator=random).to(dtype),
        "text_weight": torch.rand(batch, 5, generator=random).to(dtype),
    }
    return [*[t.to(dtype) for t in pair], torch.tensor(14.0, dtype=dtype), torch.tensor(-1.0, dtype=dtype)], options


PAIRS = [
    pytest.param(ClipLoss, open_clip_loss.ClipLoss, id="ClipLoss"),
    pytest.param(SigLipLoss, open_clip_loss.SigLipLoss, id="SigLipLoss"),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("method", ["__init__", "forward", "get_logits", "get_ground_truth"])
def test_signatures_are_those_of_open_clip(ours, theirs, method):
    """What open_clip has, in its order; what only we have comes behind and by keyword."""
    expected, actual = (list(inspect.signature(getattr(kind, method)).parameters.values()) for kind in (theirs, ours))
    own = actual[len(expected) :]
    for one, other in zip(actual, expected, strict=False):
        assert (one.name, one.default, one.kind) == (other.name, other.default, other.kind)
    assert len(actual) >= len(expected)
    assert all(p.kind == p.KEYWORD_ONLY and p.default is not p.empty for p in own)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_attributes_are_those_of_open_clip(ours, theirs):
    for name in inspect.signature(theirs).parameters:
        assert getattr(ours(), name) == getattr(theirs(), name)


@pytest.mark.parametrize("cache_labels", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_values_and_gradients_are_those_of_open_clip(ours, theirs, cache_labels):
    loss, expected = ours(cache_labels=cache_labels), theirs(cache_labels=cache_labels)
    for batch in (6, 6, 1, 9):
        inputs = features(batch)
        assert_close(loss(*inputs), expected(*inputs))
        for actual, wanted in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
            # The bias of a softmax has gradient 0 but for rounding, so its scale is that of the terms that cancel.
            assert_close(actual + 1, wanted + 1)
    assert loss(*features(), output_dict=True).keys() == {"contrastive_loss"}
    assert_identical(loss(*features(), output_dict=True)["contrastive_loss"], loss(*features()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_error_is_at_most_twice_that_of_open_clip(ours, theirs, dtype):
    inputs = features(24, 64, dtype)
    exact = [t.double() for t in inputs]
    assert_as_accurate(ours()(*inputs), theirs()(*inputs), theirs()(*exact))
    found = zip(gradients(ours(), inputs), gradients(theirs(), inputs), gradients(theirs(), exact), strict=True)
    for actual, baseline, truth in list(found)[:3]:
        assert actual.dtype == dtype
        assert_as_accurate(actual, baseline, truth)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_autocast_means_what_it_means_to_open_clip(ours, theirs):
    inputs = features(24, 64, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = ours()(*inputs), theirs()(*inputs)
    assert loss.dtype == expected.dtype
    assert_as_accurate(loss, expected, theirs()(*(t.double() for t in inputs)))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_logits_and_labels_are_those_of_open_clip(ours, theirs):
    # The loss of CLIP cannot tell: a softmax does not see the bias.
    found, expected = (kind().get_logits(*features()) for kind in (ours, theirs))
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted)
    device = torch.device("cpu")
    calls = [(device, 3)] if ours is ClipLoss else [(device, torch.float32, 3), (device, torch.float32, 3, True)]
    for cache_labels in (False, True):
        loss = ours(cache_labels=cache_labels)
        for call in calls * 2:
            assert_identical(loss.get_ground_truth(*call), theirs().get_ground_truth(*call))


@pytest.mark.parametrize("kind", [ClipLoss, TokenContrastiveLoss])
def test_labels_are_smoothed_as_torch_smooths_them(kind):
    inputs, options = (features(), {}) if kind is ClipLoss else tokens()

    def expected(*inputs):
        labels = torch.arange(len(inputs[0]))
        logits = kind().get_logits(*inputs, **options)
        return sum(cross_entropy(matrix, labels, label_smoothing=0.2) for matrix in logits) / 2

    def loss(*inputs):
        return kind(label_smoothing=0.2)(*inputs, **options)

    assert_close(loss(*inputs), expected(*inputs))
    for actual, wanted in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
        assert_close(actual + 1, wanted + 1)


def test_clip_loss_saves_one_matrix_of_logits():
    batch, width = 400, 8
    image, text, scale, bias = features(batch, width, torch.float32)

    def matrices_saved(loss):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({t.untyped_storage().data_ptr(): (t.untyped_storage().nbytes(), t)}) or t,
            lambda t: t,
        ):
            loss(image.requires_grad_(), text, scale, bias)
        return sum(size for size, _ in sizes.values()) / (4 * batch**2)

    assert 1 <= matrices_saved(ClipLoss()) < 1.1
    assert matrices_saved(open_clip_loss.ClipLoss()) >= 2


def test_a_subclass_may_bring_its_own_logits():
    class OneSided(ClipLoss):
        def get_logits(self, *arguments, **options):
            per_image, per_text = super().get_logits(*arguments, **options)
            return per_image, 2 * per_text

    per_image, per_text = OneSided().get_logits(*features())
    labels = torch.arange(len(per_image))
    expected = (cross_entropy(per_image, labels) + cross_entropy(per_text, labels)) / 2
    assert_close(OneSided()(*features()), expected)


def test_clip_loss_does_without_a_bias():
    image, text, scale, _ = features()
    assert_close(ClipLoss()(image, text, scale), open_clip_loss.ClipLoss()(image, text, scale))


def test_token_loss_is_the_mean_of_both_cross_entropies():
    (image, text, scale, bias), options = tokens()
    per_image, per_text = token_logits(image, text, scale=scale, bias=bias, **options)
    labels = torch.arange(4)
    expected = (cross_entropy(per_image, labels) + cross_entropy(per_text, labels)) / 2
    loss = TokenContrastiveLoss()
    assert_close(loss(image, text, scale, bias, **options), expected)
    assert loss(image, text, scale, output_dict=True, **options).keys() == {"contrastive_loss"}
    assert float(loss(image, text, scale)) != float(loss(image, text.flip(0), scale))


def test_token_loss_of_single_tokens_is_the_clip_loss():
    image, text, scale, bias = features()

    def on_tokens(image, text, scale, bias):
        return TokenContrastiveLoss()(image[:, None], text[:, None], scale, bias)

    inputs = [image, text, scale, bias]
    assert_close(on_tokens(*inputs), ClipLoss()(*inputs))
    for actual, expected in zip(gradients(on_tokens, inputs), gradients(ClipLoss(), inputs), strict=True):
        assert_close(actual + 1, expected + 1)


def test_token_loss_gradients_are_those_of_finite_differences():
    inputs, options = tokens(batch=2)
    leaves = [(t[..., :2] if t.dim() else t).requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *a: TokenContrastiveLoss()(*a, **options), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_token_loss_is_float32_and_finite_at_the_largest_scale(dtype):
    (image, text, *_), options = tokens(dtype=dtype)
    loss = TokenContrastiveLoss()
    scale = torch.tensor(100.0)
    value = loss(image, text, scale, **options)
    assert value.dtype == torch.float32
    assert math.isfinite(value)
    with torch.autocast("cpu", torch.bfloat16):
        assert_identical(loss(image, text, scale, **options), value)
    for gradient in gradients(lambda *a: loss(*a, **options), [image, text, scale]):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", ["clip", "siglip", "token"])
def test_traces_as_one_graph(name):
    loss, inputs = {
        "clip": (ClipLoss(), features(dtype=torch.float32)),
        "siglip": (SigLipLoss(), features(dtype=torch.float32)),
        "token": (TokenContrastiveLoss(), tokens(dtype=torch.float32)[0]),
    }[name]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*inputs), loss(*inputs))
    for actual, expected in zip(gradients(compiled, inputs), gradients(loss, inputs), strict=True):
        # The bias of a softmax has gradient 0 but for rounding, so its scale is that of the terms that cancel.
        assert_close(actual + 1, expected + 1)


@pytest.mark.parametrize("kind", [ClipLoss, SigLipLoss, TokenContrastiveLoss])
def test_bad_construction_is_refused(kind):
    error = TypeError if kind is SigLipLoss else ValueError
    with pytest.raises(error, match="label_smoothing"):
        kind(label_smoothing=1.1)
    with pytest.raises(ValueError, match="rank: expected"):
        kind(rank=2, world_size=2)
    with pytest.raises(ValueError, match="world_size: expected"):
        kind(world_size=0)


@pytest.mark.parametrize("kind", [ClipLoss, TokenContrastiveLoss])
def test_horovod_is_refused(kind):
    with pytest.raises(ValueError, match="use_horovod"):
        kind(use_horovod=True)


def test_ways_to_gather_are_named():
    with pytest.raises(ValueError, match=r"dist_impl: expected one of None, 'bidir', 'shift', .* got 'mesh'"):
        SigLipLoss(dist_impl="mesh")
    with pytest.raises(ValueError, match="gather: expected one of 'all', 'ring', got 'bidir'"):
        TokenContrastiveLoss(gather="bidir")


@pytest.mark.parametrize("kind", [ClipLoss, SigLipLoss])
@pytest.mark.parametrize(
    ("image", "text", "error", "message"),
    [
        (None, torch.zeros(2, 3), TypeError, "image_features: expected a torch.Tensor"),
        (torch.zeros(2, 3), torch.zeros(2, 3, 1), ValueError, "text_features: expected"),
        (torch.zeros(2, 3), torch.zeros(3, 3), ValueError, "text_features: expected"),
        (torch.zeros(2, 3), torch.zeros(2, 4), ValueError, "text_features: expected"),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), ValueError, "text_features: expected device"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), TypeError, "image_features: expected dtype"),
        (torch.zeros(0, 3), torch.zeros(0, 3), ValueError, "local batch size: expected at least one pair"),
    ],
)
def test_bad_features_are_named(kind, image, text, error, message):
    with pytest.raises(error, match=message):
        kind()(image, text, 1.0, 0.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text_tokens": torch.zeros(3, 5, 4)}, ValueError, "text_tokens: expected one text an image, B = 2, got 3"),
        ({"text_tokens": torch.zeros(2, 5, 3)}, ValueError, "text_tokens: expected"),
        ({"logit_scale": "1"}, TypeError, "^logit_scale: expected"),
        ({"logit_bias": torch.zeros(2)}, ValueError, "^logit_bias: expected"),
        ({"text_mask": torch.ones(2, 5)}, TypeError, "text_mask: expected"),
        ({"image_weight": torch.ones(2, 5)}, ValueError, "image_weight: expected"),
        (
            {"image_tokens": torch.zeros(0, 6, 4), "text_tokens": torch.zeros(0, 5, 4)},
            ValueError,
            "batch size: expected at least one pair",
        ),
    ],
)
def test_bad_tokens_are_named(change, error, message):
    good = {"image_tokens": torch.zeros(2, 6, 4), "text_tokens": torch.zeros(2, 5, 4), "logit_scale": 1.0}
    with pytest.raises(error, match=message):
        TokenContrastiveLoss()(**{**good, **change})


@pytest.mark.parametrize("kind", [ClipLoss, SigLipLoss, TokenContrastiveLoss])
def test_features_of_two_dtypes_are_named_where_autocast_does_not_join_them(kind):
    image, text = torch.randn(2, 6, 4), torch.randn(2, 5, 4)
    if kind is not TokenContrastiveLoss:
        image, text = image[:, 0], text[:, 0]
    message = r"^text_\w+: expected dtype torch.float32 \(that of image_\w+\), got torch.bfloat16"
    with pytest.raises(TypeError, match=message):
        kind()(image, text.bfloat16(), 1.0, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        kind()(image, text.bfloat16(), 1.0, 0.0)


@pytest.mark.parametrize("kind", [ClipLoss, SigLipLoss, TokenContrastiveLoss])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scale_and_bias_are_any_tensor_of_one_element(kind, shape):
    inputs = tokens(dtype=torch.bfloat16)[0] if kind is TokenContrastiveLoss else features(dtype=torch.bfloat16)
    scale, bias = torch.full(shape, 3.0, requires_grad=True), torch.full(shape, -1.0)
    assert_identical(kind()(*inputs[:2], scale, bias), kind()(*inputs[:2], torch.tensor(3.0), torch.tensor(-1.0)))
    kind()(*inputs[:2], scale, bias).backward()
    assert scale.grad.shape == shape


@pytest.mark.parametrize("kind", [ClipLoss, SigLipLoss, TokenContrastiveLoss])
def test_a_local_loss_in_a_group_of_several_processes_warns_once(kind, monkeypatch):
    monkeypatch.setattr(gather, "_warned", set())
    loss = kind()
    monkeypatch.setattr(gather.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(gather.dist, "get_world_size", lambda: 4)
    inputs = tokens()[0] if kind is TokenContrastiveLoss else features()
    with pytest.warns(UserWarning, match=r"own process only, but the process group has 4.*world_size=torch"):
        loss(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(*inputs)
        kind()


@pytest.mark.parametrize("kind", [ClipLoss, SigLipLoss, TokenContrastiveLoss])
def test_several_ranks_need_a_process_group(kind):
    inputs = tokens()[0] if kind is TokenContrastiveLoss else features()
    with pytest.raises(RuntimeError, match="init_process_group"):
        kind(rank=0, world_size=2)(*inputs)
