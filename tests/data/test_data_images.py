"""Decoding, views and tokens."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from tiny_sources import picture

from mlip_kernels.data.batch import CLIP_MEAN, CLIP_STD, normalize, tokenize
from mlip_kernels.data.images import MAX_PIXELS, UPRIGHT, UndecodableError, central_view, decode, load, random_view
from mlip_kernels.data.seeds import generator
from mlip_kernels.testing import assert_close, assert_identical

image_transform = pytest.importorskip("open_clip.transform", reason="needs the [train] extra").image_transform
to_pil_image = pytest.importorskip("torchvision.transforms.functional").to_pil_image

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


def encoded(image, kind: str, **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def pixels(data: bytes) -> list[list[list[int]]]:
    """What `load` gives, as rows of (red, green, blue)."""
    return load(data, 4096).permute(1, 2, 0).tolist()


def random_pixels(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def on_white(color: np.ndarray, alpha: np.ndarray) -> list:
    """``color`` of weight ``alpha`` / 255 on white, to the nearest integer, halves up."""
    alpha = alpha.astype(int)[..., None]
    return ((color.astype(int) * alpha + 255 * (255 - alpha) + 127) // 255).tolist()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP"])
def test_rgb_and_gray_pixels_are_exact(kind):
    from PIL import Image

    lossless = {"lossless": True} if kind == "WEBP" else {}
    rgb, gray = random_pixels(5, 7, 3), random_pixels(5, 7)
    assert pixels(encoded(Image.fromarray(rgb), kind, **lossless)) == rgb.tolist()
    assert pixels(encoded(Image.fromarray(gray), kind, **lossless)) == np.stack([gray] * 3, -1).tolist()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_transparent_pixels_lie_on_white(kind):
    from PIL import Image

    lossless = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    rgba = random_pixels(6, 9, 4)
    expected = on_white(rgba[..., :3], rgba[..., 3])
    assert pixels(encoded(Image.fromarray(rgba), kind, **lossless)) == expected
    if kind != "WEBP":
        gray = np.stack([rgba[..., 0]] * 3, -1)
        assert pixels(encoded(Image.fromarray(rgba[..., ::3].copy(), "LA"), kind)) == on_white(gray, rgba[..., 3])


@pytest.mark.parametrize(
    ("kind", "transparency", "expected"),
    [
        ("PNG", None, [[10, 20, 30], [40, 50, 60], [70, 80, 90]]),
        ("PNG", 1, [[10, 20, 30], [255, 255, 255], [70, 80, 90]]),
        ("PNG", bytes([255, 0, 51]), [[10, 20, 30], [255, 255, 255], [218, 220, 222]]),
        ("GIF", 1, [[10, 20, 30], [255, 255, 255], [70, 80, 90]]),
    ],
)
def test_a_palette_with_transparency_lies_on_white(kind, transparency, expected):
    from PIL import Image

    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    settings = {} if transparency is None else {"transparency": transparency}
    assert pixels(encoded(image, kind, **settings)) == [expected]


def test_a_transparent_colour_of_rgb_and_gray_becomes_white():
    from PIL import Image

    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(encoded(rgb, "PNG", transparency=(4, 5, 6))) == [[[1, 2, 3], [255] * 3]]
    gray = Image.fromarray(np.array([[9, 8]], np.uint8))
    assert pixels(encoded(gray, "PNG", transparency=9)) == [[[255] * 3, [8] * 3]]
    deep = Image.fromarray(np.array([[999, 51200]], np.uint16))
    assert pixels(encoded(deep, "PNG", transparency=999)) == [[[255] * 3, [200] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind):
    from PIL import Image

    deep = random_pixels(8, 8, dtype=np.uint16)
    assert pixels(encoded(Image.fromarray(deep), kind)) == np.stack([deep // 256] * 3, -1).tolist()


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_is_what_the_inks_leave(kind):
    from PIL import Image

    inks = random_pixels(6, 4).astype(int)
    for row in inks:
        # one colour a picture, so that JPEG keeps it but for the rounding of its transform
        image = Image.new("CMYK", (8, 8), tuple(row.tolist()))
        expected = (255 - row[:3]) * (255 - row[3]) / 255
        found = np.array(pixels(encoded(image, kind, **({"quality": 100} if kind == "JPEG" else {}))))
        assert np.abs(found - expected).max() <= (2 if kind == "JPEG" else 1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(kind, orientation):
    from PIL import Image

    upright = np.kron(random_pixels(2, 3, 3), np.ones((16, 16, 1), np.uint8))
    image = Image.fromarray(upright)
    back = {"ROTATE_90": "ROTATE_270", "ROTATE_270": "ROTATE_90"}
    if orientation in UPRIGHT:
        method = UPRIGHT[orientation]
        image = image.transpose(Image.Transpose[back.get(method, method)])
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    found = np.array(pixels(encoded(image, kind, exif=exif, **settings)))
    assert found.shape == upright.shape
    assert np.abs(found - upright.astype(int)).max() <= (2 if kind == "JPEG" else 0)


def test_orientation_six_is_turned_clockwise():
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.array([[[1] * 3, [2] * 3], [[3] * 3, [4] * 3]], np.uint8))
    assert [[red for red, _, _ in row] for row in pixels(encoded(stored, "PNG", exif=exif))] == [[3, 1], [4, 2]]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_leaves_the_picture_as_it_is_stored():
    from PIL import Image

    rgb = random_pixels(4, 6, 3)
    for exif in (b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0noise", b"\0"):
        assert pixels(encoded(Image.fromarray(rgb), "PNG", exif=exif)) == rgb.tolist()


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_modes_without_a_fixed_range_are_refused_by_name(mode):
    from PIL import Image

    with pytest.raises(UndecodableError, match=f"pixels of mode {mode} have no defined conversion"):
        load(encoded(Image.new(mode, (4, 4)), "TIFF"), 4)


@pytest.mark.parametrize("kind", ["PPM", "ICO", "JPEG2000", "TGA", "PCX"])
def test_other_formats_stay_shut(kind):
    from PIL import Image

    with pytest.raises(UndecodableError, match="damaged, or not one of JPEG, PNG, WEBP, GIF, BMP, TIFF"):
        load(encoded(Image.new("RGB", (32, 32)), kind), 4)


def test_postscript_starts_no_process(monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **_: started.append(arguments))
    assert decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n", 4) is None
    assert not started


def huge_png(width: int, height: int) -> bytes:
    """A valid gray PNG of zeros: a kilobyte of file a million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pack = zlib.compressobj(1)
    rows = b"".join(pack.compress(bytes(1 + width)) for _ in range(height)) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


PEAKS = """
import re, sys
from mlip_kernels.data.images import decode
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
files = [open(path, "rb").read() for path in sys.argv[1:]]
decode(files.pop(0), 64)
for data in files:
    before = peak()
    print(decode(data, 64) is not None, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_decoding_takes_less_than_a_gibibyte(tmp_path):
    assert MAX_PIXELS == 8192**2
    sides = (8, 8193, 8192)
    for side in sides:
        (tmp_path / f"{side}").write_bytes(huge_png(side, side))
    command = [sys.executable, "-c", PEAKS, *(str(tmp_path / f"{side}") for side in sides)]
    found = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    assert found[::2] == ["False", "True"]
    assert int(found[1]) < 64
    assert int(found[3]) < 1024


def test_a_large_jpeg_is_reduced_before_its_pixels_are_counted(monkeypatch):
    monkeypatch.setattr("mlip_kernels.data.images.MAX_PIXELS", 100_000)
    assert load(picture(1, 1600, 1200, "JPEG"), 64).shape == (3, 150, 200)
    with pytest.raises(UndecodableError, match="1600 x 1200 pixels are more than the 100,000 that are read"):
        load(picture(1, 1600, 1200, "PNG"), 64)
    monkeypatch.setattr("mlip_kernels.data.images.MAX_JPEG_PIXELS", 1_000_000)
    assert decode(picture(1, 1600, 1200, "JPEG"), 64) is None


def test_decoding_leaves_the_filters_of_warnings_alone(monkeypatch):
    """They are shared by all threads: one that sets them back undoes what another set."""
    from PIL import Image

    decode(picture(0), 4)
    before = list(warnings.filters)
    opened, seen = Image.open, []

    def spy(*arguments: object, **settings: object) -> object:
        seen.append(list(warnings.filters))
        return opened(*arguments, **settings)

    monkeypatch.setattr(Image, "open", spy)
    decode(picture(1), 4)
    assert seen == [before]
    assert warnings.filters == before


@pytest.mark.parametrize("shape", [(37, 64), (64, 37), (50, 50), (20, 20), (20, 61)])
def test_the_central_view_is_that_of_open_clip(shape):
    image = torch.randint(256, (3, *shape), dtype=torch.uint8, generator=generator(3))
    *steps, to_tensor, _ = image_transform(24, is_train=False).transforms
    picture = to_pil_image(image)
    for step in steps:
        picture = step(picture)
    assert_identical(central_view(image, 24).float() / 255, to_tensor(picture))


def test_the_central_view_of_a_long_strip_is_its_middle():
    strip = torch.zeros(3, 2, 2**20, dtype=torch.uint8)
    strip[:, :, 2**19 - 1 : 2**19 + 1] = 200
    assert_identical(central_view(strip, 64), torch.full((3, 64, 64), 200, dtype=torch.uint8))


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


def test_a_word_without_end_takes_no_longer_than_it_has_to():
    import random

    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=3000))
    expected = tokenize([letters], 24)
    began = time.process_time()
    assert_identical(tokenize([letters * 40, f"{letters} and more"], 24), expected.expand(2, 24))
    assert time.process_time() - began < 5, "120,000 letters took many minutes"
