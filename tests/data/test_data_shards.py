"""Webdataset shards: what is read, what is refused, what is skipped."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_sources import picture, write_tar

from mlip_kernels.data import DataConfig, open_data

pytest.importorskip("open_clip", reason="needs the [train] extra")
pytest.importorskip("webdataset", reason="needs the [train] extra")


def captions(batches) -> list[str]:
    return [caption for batch in batches for caption in batch.captions]


def test_a_pass_sees_every_sample_once_and_the_next_begins_anew(shards_config):
    data = open_data(shards_config(samples_per_epoch=48))
    seen = captions(data.train(0))
    samples = sorted(f"train sample {number}" for number in range(24))
    assert sorted(seen[:24]) == sorted(seen[24:]) == samples
    assert seen[:24] != seen[24:]


def test_held_out_shards_are_read_in_order(shards_config):
    data = open_data(shards_config(held_out_pairs=5))
    assert captions(data.held_out(2)) == [f"test sample {number}" for number in range(5)]


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_and_empty_captions_are_replaced_counted_and_named(make_shards, workers):
    corrupt, empty = (0, 9, 10, 22), (1, 2)
    config = DataConfig(
        make_shards(corrupt=corrupt, empty=empty),
        make_shards(1, 6, corrupt=(3,), name="test"),
        samples_per_epoch=22,
        image_size=16,
        batch_size=2,
        workers=workers,
    )
    data = open_data(config)
    seen = {int(caption.split()[-1]) for caption in captions(data.train(0))}
    assert seen == set(range(24)) - set(corrupt) - set(empty)
    assert captions(data.held_out(9)) == [f"test sample {number}" for number in (0, 1, 2, 4, 5)]
    assert "5 corrupt images, 2 empty captions" in data.report()
    assert "train-000.tar: 00000" in data.report()


def test_a_replacement_comes_from_the_batch_before(shards_config):
    config = shards_config(corrupt=(5,), samples_per_epoch=24, batch_size=6)
    damaged = [batch.captions for batch in open_data(config).train(0)]
    whole = [batch.captions for batch in open_data(shards_config(samples_per_epoch=24, batch_size=6)).train(0)]
    for number, (now, before) in enumerate(zip(damaged, whole, strict=True)):
        for place, caption in enumerate(before):
            expected = caption
            if caption == "train sample 5":
                expected = whole[number - 1][place] if number else before[(place + 1) % 6]
            assert now[place] == expected


def test_a_repeated_caption_is_held_out_once(shards_config, tmp_path):
    members = {
        f"{i}.{ext}": data for i in range(3) for ext, data in (("jpg", picture(i, kind="JPEG")), ("txt", b"a Dog"))
    }
    write_tar(tmp_path / "twins.tar", members)
    assert captions(open_data(shards_config(held_out=str(tmp_path / "twins.tar"))).held_out(4)) == ["a Dog"]


def test_a_missing_or_unreadable_shard_is_named_at_once(shards_config, tmp_path):
    config = shards_config()
    Path(tmp_path / "train-001.tar").write_bytes(b"no tar file at all")
    with pytest.raises(OSError, match=r"train-001.tar: cannot read the shard"):
        open_data(config)
    Path(tmp_path / "train-001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-001.tar: no such shard"):
        open_data(config)
    with pytest.raises(ValueError, match=r"braces cannot be expanded"):
        open_data(replace(config, data=str(tmp_path / "train-{000..tar.tar"), held_out="x{.tar"))


def test_a_shard_that_ends_early_is_named_when_it_is_reached(shards_config, tmp_path):
    config = shards_config()
    source = random.Random(0)
    shard = tmp_path / "train-002.tar"
    write_tar(shard, {"a.png": source.randbytes(20000), "a.txt": b"noise"})
    shard.write_bytes(shard.read_bytes()[:9000])
    with pytest.raises(OSError, match=r"train-002.tar: cannot read the shard"):
        list(open_data(config).train(0))


def test_shards_without_pairs_or_valid_images_are_an_error(shards_config, tmp_path):
    write_tar(tmp_path / "other.tar", {"a.json": b"{}", "b.txt": b"alone"})
    with pytest.raises(ValueError, match=r"other.tar: no key with an image \(jpg, png, webp, jpeg\) and a caption"):
        next(open_data(shards_config(data=str(tmp_path / "other.tar"))).train(0))
    with pytest.raises(ValueError, match=r"none of 4 images in a row can be decoded"):
        next(open_data(shards_config(corrupt=tuple(range(24)))).train(0))


def test_shards_for_training_and_evaluation_must_differ(shards_config, tmp_path):
    with pytest.raises(ValueError, match=r"held_out: .*train-001.tar in both"):
        open_data(shards_config(held_out=str(tmp_path / "train-001.tar")))


def test_every_sample_is_augmented_on_its_own(shards_config, tmp_path):
    image = picture(0, 200, 200)
    write_tar(
        tmp_path / "same.tar", {f"{i}.{ext}": data for i in range(24) for ext, data in (("png", image), ("txt", b"x"))}
    )
    views = [
        view for batch in open_data(shards_config(data=str(tmp_path / "same.tar"))).train(0) for view in batch.images
    ]
    assert len({view.numpy().tobytes() for view in views}) > len(views) // 2
