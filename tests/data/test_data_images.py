"""Decoding, views and tokens."""

from __future__ import annotations

import pytest
import torch
from tiny_sources import picture

from mlip_kernels.data.batch import CLIP_MEAN, CLIP_STD, normalize, tokenize
from mlip_kernels.data.images import central_view, decode, random_view
from mlip_kernels.data.seeds import generator
from mlip_kernels.testing import assert_close, assert_identical

pytest.importorskip("open_clip", reason="needs the [train] extra")

START, END = 49406, 49407


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_decode_gives_rgb_and_none_for_damage(kind):
    data = picture(1, 40, 30, kind)
    image = decode(data, 16)
    assert image is not None
    assert image.shape == (3, 30, 40)
    assert image.dtype == torch.uint8
    assert decode(data[: len(data) // 2], 16) is None
    assert decode(b"", 16) is None


def test_a_large_jpeg_keeps_twice_the_wanted_size():
    image = decode(picture(1, 1600, 1200, "JPEG"), 64)
    assert image is not None
    assert 128 <= min(image.shape[1:]) < 300


def test_the_central_view_is_the_middle_square():
    image = torch.zeros(3, 8, 20, dtype=torch.uint8)
    image[:, :, 6:14] = 200
    assert_identical(central_view(image, 8), torch.full((3, 8, 8), 200, dtype=torch.uint8))
    assert_identical(central_view(image.mT, 32), torch.full((3, 32, 32), 200, dtype=torch.uint8))


def test_random_views_move_a_little_and_never_mirror():
    columns = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64)
    views = [random_view(columns, 64, generator(seed))[0, 0].double() for seed in range(50)]
    for view in views:
        assert bool((view.diff() >= 0).all())
        assert 0.8 * 64 <= view[-1] - view[0] + 1 <= 64
    assert len({view[0].item() for view in views}) > 3


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (33, 64)])
def test_views_exist_for_every_shape(shape):
    image = torch.full((3, *shape), 7, dtype=torch.uint8)
    for view in (central_view(image, 16), random_view(image, 16, generator(0))):
        assert_identical(view, torch.full((3, 16, 16), 7, dtype=torch.uint8))


def test_normalisation_is_that_of_clip():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=generator("images"))
    mean, deviation = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    assert_close(normalize(images), (images.double() / 255 - mean) / deviation)


def test_tokens_are_those_of_open_clip_with_zeros_behind():
    import open_clip

    captions = ["grinning face with big eyes", "two  Dogs &amp; a cat"]
    assert_identical(tokenize(captions, 77), open_clip.get_tokenizer("ViT-B-32")(captions))
    rows = tokenize(captions, 12)
    assert rows.shape == (2, 12)
    assert rows[0].tolist()[0] == START
    assert rows[0].tolist()[-5:] == [END, 0, 0, 0, 0]


def test_a_long_caption_is_cut_and_keeps_its_end():
    row = tokenize(["one two three four five six seven"], 5)[0].tolist()
    assert row[0] == START
    assert row[-1] == END
    assert 0 not in row
