"""Webdataset shards: what is read, what is refused, what is skipped."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_sources import UNREADABLE, needs_proc, picture, write_tar

from mlip_kernels.data import DataConfig, open_data
from mlip_kernels.data.patterns import count, expand

pytest.importorskip("open_clip", reason="needs the [train] extra")
pytest.importorskip("webdataset", reason="needs the [train] extra")
braceexpand = pytest.importorskip("braceexpand", reason="needs the [train] extra")


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
    with pytest.raises(OSError, match=r'train-001.tar: cannot read the shard: .*on_damage: "skip"'):
        open_data(config)
    Path(tmp_path / "train-001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-001.tar: no such shard"):
        open_data(config)
    with pytest.raises(ValueError, match=r"braces cannot be expanded"):
        open_data(replace(config, data=str(tmp_path / "train-{000..tar.tar"), held_out="x{.tar"))


def layout(path: Path) -> list[tuple[int, int, int]]:
    """Where the header, the content and the padding of each member begin."""
    with tarfile.open(path) as tar:
        return [(member.offset, member.offset_data, member.offset_data + member.size) for member in tar]


CUTS = {
    "behind a header": lambda header, content, _: content,
    "within a header": lambda header, content, _: header + 100,
    "before a header": lambda header, content, _: header,
    "within the content": lambda header, content, padding: padding - 1,
    "before the padding": lambda header, content, padding: padding,
    "within the padding": lambda header, content, padding: padding + 1,
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_no_cut_shard_passes_as_whole(shards_config, tmp_path, cut, packed, capfd):
    config = shards_config(held_out_pairs=1, samples_per_epoch=16, batch_size=8)
    shard = tmp_path / ("train-002.tar.gz" if packed else "train-002.tar")
    place = cut(*layout(tmp_path / "train-002.tar")[11])  # the caption of the sixth pair
    data = (tmp_path / "train-002.tar").read_bytes()[:place]
    shard.write_bytes(gzip.compress(data) if packed else data)
    config = replace(config, data=str(shard))
    if not packed:
        with pytest.raises(OSError, match=r"train-002.tar: cannot read the shard: no end mark"):
            open_data(config)
    with pytest.raises(OSError, match=r'train-002.tar.*: cannot read the shard: .*; on_damage: "skip" goes on'):
        list(open_data(replace(config, on_damage="error")).train(0))
    capfd.readouterr()
    opened = open_data(replace(config, on_damage="auto" if packed else "skip"))
    whole = 5 if place < layout(tmp_path / "train-001.tar")[11][2] else 6
    assert {caption for batch in opened.train(0) for caption in batch.captions} == {
        f"train sample {number}" for number in range(16, 16 + whole)
    }
    assert ", the ends of 1 damaged shards\n  damaged: " in opened.report()
    said = [line for line in capfd.readouterr().err.splitlines() if str(shard) in line]  # perhaps behind a progress bar
    assert len(said) == 1, "once, and not for every pass"


@pytest.mark.parametrize("kind", ["a header", "a stray end mark", "a packed byte"])
def test_damage_in_the_middle_is_no_end(shards_config, tmp_path, kind):
    config = shards_config(held_out_pairs=1, samples_per_epoch=16, batch_size=8)
    shard = tmp_path / "train-000.tar"
    header = layout(shard)[8][0]
    data = bytearray(shard.read_bytes())
    if kind == "a header":
        data[header + 3] ^= 1
    elif kind == "a stray end mark":
        data[header : header + 1024] = bytes(1024)
    else:
        shard = tmp_path / "train-000.tar.gz"
        data = bytearray(gzip.compress(data))
        data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    opened = open_data(replace(config, data=str(shard), on_damage="skip" if kind == "a packed byte" else "auto"))
    assert captions(opened.train(0))
    assert f", the ends of 1 damaged shards\n  damaged: {shard}: cannot read the shard: " in opened.report()


def test_whole_shards_are_not_called_damaged(shards_config, tmp_path):
    config = shards_config(samples_per_epoch=48)
    for path in tmp_path.glob("train-*.tar"):
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    for one in (config, replace(config, data=f"{config.data}.gz")):
        opened = open_data(one)
        seen = captions(opened.train(0))
        assert len(set(seen)) == 24
        assert opened.report().endswith(
            "skipped so far: 0 corrupt images, 0 empty captions, the ends of 0 damaged shards"
        )


def test_long_names_other_members_and_folders_are_no_damage(shards_config, tmp_path):
    with tarfile.open(tmp_path / "long.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(folder := tarfile.TarInfo("folder"))
        folder.type = tarfile.DIRTYPE
    members = {}
    for number in range(24):
        stem = f"{'deep/' * 40}{number:05d}"
        members |= {f"{stem}.json": b"{}", f"{stem}.JPG": picture(number), f"{stem}.txt": b"text %d" % number}
    write_tar(tmp_path / "long.tar", {**members, "__meta__/index.json": b"", "README": b"no sample"})
    opened = open_data(shards_config(data=str(tmp_path / "long.tar"), samples_per_epoch=24))
    assert sorted(captions(opened.train(0))) == sorted(f"text {number}" for number in range(24))
    assert "0 corrupt images, 0 empty captions, the ends of 0 damaged shards" in opened.report()


def test_a_key_that_comes_again_is_another_sample(shards_config, tmp_path):
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for name, data in (
            ("a.png", picture(0)),
            ("a.txt", b"one"),
            ("a.png", picture(1)),
            ("a.txt", b"two"),
            ("b.png", picture(2)),
            ("b.png", picture(3)),
            ("b.txt", b"three"),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    opened = open_data(shards_config(data=str(tmp_path / "twice.tar"), samples_per_epoch=3, batch_size=3))
    assert sorted(captions(opened.train(0))) == ["one", "three", "two"]
    assert "1 empty captions" in opened.report(), "the first b.png has none"


def test_unusable_captions_are_counted_with_the_reason(shards_config, tmp_path):
    bad = {"a": b"x" * 131_073, "b": b"x" * 2**20, "c": "café".encode("latin-1")}
    pairs = {f"{key}.{end}": data for key, text in bad.items() for end, data in (("png", picture(0)), ("txt", text))}
    write_tar(tmp_path / "bad.tar", {**pairs, "d.png": picture(1), "d.txt": "café".encode()})
    opened = open_data(shards_config(data=str(tmp_path / "bad.tar"), samples_per_epoch=1, batch_size=1))
    assert captions(opened.train(0)) == ["café"]
    assert opened.report().count("  corrupt: ") == 3
    assert "bad.tar: a: a caption of more than 131,072 characters" in opened.report()
    assert "bad.tar: c: a caption that is not in UTF-8" in opened.report()


@pytest.mark.parametrize("endings", [("json", "cls"), ("jpg", "json"), ("jpg", "cls"), ("txt", "json")])
def test_shards_that_lack_captions_or_images_are_refused_at_once(shards_config, tmp_path, endings):
    write_tar(tmp_path / "other.tar", {f"{key}.{ending}": b"{}" for key in range(20) for ending in endings})
    config = shards_config(data=str(tmp_path / "other.tar"))
    listed = ", ".join(sorted(f".{ending}" for ending in endings))
    with pytest.raises(ValueError, match=rf"other.tar: no key with .* a caption \(txt\); its members end in {listed}$"):
        open_data(config)


def test_reading_that_takes_long_shows_its_progress(shards_config, monkeypatch, capfd):
    config = shards_config()
    expected = [batch.captions for batch in open_data(config).train(0)]
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("mlip_kernels.data.reading.SECONDS_BEFORE_PROGRESS", 0.0)
    assert [batch.captions for batch in open_data(config).train(0, 5)] == expected[5:]
    shown = capfd.readouterr().err
    assert "checking shards: 100%" in shown
    assert "reading up to where the run stopped: 100%" in shown


@needs_proc
def test_a_shard_that_cannot_be_read_is_named(shards_config, tmp_path):
    (tmp_path / "unreadable.tar").symlink_to(UNREADABLE)
    with pytest.raises(OSError, match=rf"^{tmp_path}/unreadable.tar: cannot be read: [^\n]*$"):
        open_data(shards_config(data=str(tmp_path / "unreadable.tar"), on_damage="skip"))


@pytest.mark.parametrize(
    ("pattern", "number"),
    [
        ("a.tar", 1),
        ("{000..041}.tar", 42),
        ("{9..1..2}.tar", 9),
        ("{a..z}-{0..9}.tar", 260),
        ("{one,two,three}.tar", 3),
        ("{cc3m-{000..331},cc12m-{000..999}}.tar", 1332),
        ("{x}{y,}.tar", 2),
        ("{000..999999999}.tar", 10**9),
        ("{0..999}{0..999}{0..999}.tar", 10**9),
        ("{{0..99999}{0..99999},b}.tar", 10**10 + 1),
    ],
)
def test_braces_are_counted_before_they_are_expanded(pattern, number):
    assert count(pattern) == number
    if number <= 10_000:
        assert set(expand(pattern)) <= set(braceexpand.braceexpand(pattern))
        assert number // 2 <= len(expand(pattern)) <= number
    else:
        with pytest.raises(ValueError, match=rf"expected braces that make at most 1,000,000 shards, got {number:,}$"):
            expand(pattern)


PEAK = """
import re, sys
from mlip_kernels.data.shards import Shards
from mlip_kernels.data.tars import DamagedShardError
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
before = peak()
shards = Shards(sys.argv[1], "skip", show_progress=False)
print(sum(1 for _ in shards.samples(shards.paths)), peak() - before, *shards.damaged.values(), *shards.corrupt.values())
"""


def bomb(path: Path, claim: tarfile.TarInfo, mebibytes: int) -> None:
    """A gzip shard of a good pair, ``claim`` and zeros: a few kilobytes a mebibyte."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        for name, data in (("a.png", picture(0)), ("a.txt", b"good")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.write(entry.tobuf() + data + bytes(-len(data) % 512))
        file.write(claim.tobuf())
        for _ in range(mebibytes):
            file.write(bytes(2**20))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_no_shard_takes_much_memory(tmp_path):
    """Each of these took what it claims, or what it expands to."""
    picture_of_zeros, name_of_zeros = tarfile.TarInfo("b.png"), tarfile.TarInfo("././@LongLink")
    picture_of_zeros.size, name_of_zeros.size = 400 * 2**20, 400 * 2**20
    name_of_zeros.type = tarfile.GNUTYPE_LONGNAME
    bomb(tmp_path / "0.tar.gz", picture_of_zeros, 400)
    bomb(tmp_path / "1.tar.gz", name_of_zeros, 400)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "{0,1}.tar.gz")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    pairs, mebibytes, said = run.stdout.strip().split(maxsplit=2)
    assert pairs == "2"
    assert int(mebibytes) < 64
    assert "0.tar.gz: cannot read the shard: it expands to more than 100 times its size" in said
    assert "1.tar.gz: cannot read the shard: damaged header: 419430400 bytes" in said


def test_shards_without_pairs_or_valid_images_are_an_error(shards_config, tmp_path):
    write_tar(tmp_path / "other.tar", {"a.json": b"{}", "b.txt": b"alone"})
    with pytest.raises(ValueError, match=r"other.tar: no key with an image \(jpg, png, .*\) and a caption \(txt\)"):
        open_data(shards_config(data=str(tmp_path / "other.tar")))
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
