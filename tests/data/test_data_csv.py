"""Pairs listed in a CSV: what is read, what is refused, what is skipped."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_sources import UNREADABLE, needs_proc, picture

from mlip_kernels.data import DataConfig, open_data
from mlip_kernels.data.csv_pairs import CsvPairs
from mlip_kernels.testing import assert_identical, threads

pytest.importorskip("open_clip", reason="needs the [train] extra")


def captions(batches) -> list[str]:
    return [caption for batch in batches for caption in batch.captions]


def test_training_and_held_out_pairs_are_apart_and_complete(csv_config):
    data = open_data(csv_config())
    training, held_out = captions(data.train(0)), captions(data.held_out(100))
    assert len(held_out) == 8
    assert sorted(training + held_out) == sorted(f"picture number {row}" for row in range(40))


def test_the_split_does_not_depend_on_the_order_of_rows(csv_config):
    config = csv_config()
    expected = captions(open_data(config).held_out(100))
    with open(config.data) as file:
        header, *rows = file
    with open(config.data, "w") as file:
        file.writelines([header, *reversed(rows)])
    assert captions(open_data(config).held_out(100)) == expected


def test_no_held_out_picture_is_trained_on_under_another_caption(tmp_path):
    lines = ["filepath\ttitle"]
    for row in range(20):
        (tmp_path / f"{row}.png").write_bytes(picture(row))
        lines += [f"{row}.png\tfirst of {row}", f"{row}.png\tsecond of {row}"]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    data = open_data(DataConfig(str(tmp_path / "pairs.csv"), held_out_pairs=5, batch_size=10, image_size=8))
    held_out = {caption.split()[-1] for caption in captions(data.held_out(9))}
    trained = {caption.split()[-1] for caption in captions(data.train(0))}
    assert len(held_out) == 5
    assert len(trained) == 15
    assert not held_out & trained


def test_no_caption_is_held_out_twice(tmp_path):
    lines = ["filepath\ttitle"]
    for row in range(30):
        (tmp_path / f"{row}.png").write_bytes(picture(row))
        lines.append(f"{row}.png\t{'A  dog' if row % 2 else 'a dog'}" if row < 20 else f"{row}.png\tcat {row}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    data = open_data(DataConfig(str(tmp_path / "pairs.csv"), held_out_pairs=25, batch_size=1, image_size=8))
    held_out = [" ".join(caption.lower().split()) for caption in captions(data.held_out(9))]
    assert len(held_out) == len(set(held_out)) == 11


def test_held_out_pairs_may_come_from_another_file(csv_config, make_csv):
    config = csv_config(held_out=str(make_csv(6, name="other")))
    data = open_data(config)
    assert data.batches_per_epoch == 10
    assert len(captions(data.held_out(4))) == 6


def test_samples_per_epoch_shortens_an_epoch(csv_config):
    config = csv_config(samples_per_epoch=9)
    assert open_data(config).batches_per_epoch == 2
    with pytest.raises(ValueError, match=r"samples_per_epoch: expected at most the 32 training pairs .*got 33"):
        open_data(replace(config, samples_per_epoch=33))


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_and_empty_captions_are_replaced_counted_and_named(make_csv, workers):
    path = str(make_csv(40, corrupt=tuple(range(0, 40, 4)), empty=(1, 2)))
    data = open_data(DataConfig(path, held_out_pairs=8, image_size=16, batch_size=5, workers=workers))
    assert "0 corrupt images, 2 empty captions" in data.report()
    batches = list(data.train(0))
    assert all(len(set(batch.captions)) == 5 for batch in batches)
    seen = captions(batches) + captions(data.held_out(8))
    assert {int(caption.split()[-1]) for caption in seen} <= {row for row in range(40) if row % 4 and row not in (1, 2)}
    assert "10 corrupt images, 2 empty captions\n" in data.report()
    assert "line 2: pairs0.png: damaged: image file is truncated" in data.report()
    assert f"{path}, line 2: pairs0.png" in data.report()


def test_only_corrupt_images_are_an_error(csv_config):
    data = open_data(csv_config(corrupt=tuple(range(40))))
    with pytest.raises(ValueError, match=r"none of the 32 training images in .*pairs.csv can be decoded"):
        next(data.train(0))
    with pytest.raises(ValueError, match=r"held_out: no valid pair in .*pairs.csv"):
        next(data.held_out(4))


def test_absolute_paths_another_separator_and_quoted_captions_are_read(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "lists").mkdir()
    rows = [f'{tmp_path}/images/{row}.jpg,"red, ""green"" and {row}"' for row in range(4)]
    for row in range(4):
        (tmp_path / f"images/{row}.jpg").write_bytes(picture(row, 500, 300, "JPEG"))
    path = tmp_path / "lists" / "pairs.csv"
    path.write_text("\ufeffimage,words\n" + "\n".join(rows), encoding="utf-8")
    config = DataConfig(
        str(path),
        csv_separator=",",
        csv_image_key="image",
        csv_caption_key="words",
        held_out_pairs=1,
        image_size=8,
        batch_size=3,
    )
    found = captions(open_data(config).train(0)) + captions(open_data(config).held_out(1))
    assert sorted(found) == [f'red, "green" and {row}' for row in range(4)]


def test_files_are_named_in_errors_before_training(tmp_path, make_csv):
    with pytest.raises(FileNotFoundError, match=r"nowhere.csv: no such file"):
        open_data(DataConfig(str(tmp_path / "nowhere.csv")))
    path = make_csv(40)
    (tmp_path / "pairs7.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"pairs.csv, line 9: no such image: .*pairs7.png"):
        open_data(DataConfig(str(path)))


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (b"path\ttitle\n", {}, r"csv_image_key: .*pairs.csv has no column 'filepath'.*\['path', 'title'\]"),
        (b"filepath\tcaption\n", {}, "csv_caption_key: .*pairs.csv has no column 'title'"),
        (b"filepath,title\n", {}, r"csv_image_key: .*separated at '\\t' its header reads \['filepath,title'\]"),
        (b"", {}, r"csv_image_key: .*its header reads \[\]"),
        (b"filepath\ttitle\n\tred\n", {}, "pairs.csv, line 2: no path in column 'filepath'"),
        (b"filepath\ttitle\n", {}, "pairs.csv: no row with an image and a caption"),
        (
            b"filepath\ttitle\n\xff\xfe\tred\n",
            {},
            "pairs.csv: cannot be read as CSV in UTF-8: line 2 has the byte 0xff at 1$",
        ),
        ("filepath\ttitle\n".encode("utf-16"), {}, "in UTF-8: line 1 has the byte 0xff at 1, as UTF-16 begins"),
        ("filepath\ttitle\n".encode("utf-16-le"), {}, "pairs.csv, line 1: a NUL byte"),
        ("filepath\ttitle\na.png\tcafé".encode("latin-1"), {}, "in UTF-8: line 2 has the byte 0xe9 at 10$"),
        (b"filepath\ttitle\ttitle\n", {}, "csv_caption_key: .*pairs.csv has several columns 'title'"),
        (b"filepath\ttitle\nhere.png\n", {}, "pairs.csv, line 2: expected 2 fields .*, got 1"),
        (b"filepath\ttitle\nhere.png\tred\tgreen\n", {}, "pairs.csv, line 2: expected 2 fields .*, got 3"),
        (b"filepath\ttitle\nhere.png\tred\0\n", {}, "pairs.csv, line 2: a NUL byte"),
        (b"filepath\ttitle\nhere.png\t%b\n" % (b"x" * 131_073), {}, "pairs.csv, line 2: field larger than .*131072"),
        (
            b"filepath\ttitle\n%b" % (b"x" * 2**24),
            {},
            "pairs.csv, line 2: expected less than 16,777,216 bytes in a line",
        ),
    ],
)
def test_a_wrong_csv_is_named_with_its_fault(tmp_path, content, settings, message):
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    (tmp_path / "here.png").write_bytes(picture(0))
    with pytest.raises(ValueError, match=message) as caught:
        open_data(DataConfig(str(path), **settings))
    assert "\n" not in str(caught.value)


def test_a_caption_of_the_largest_length_is_read(csv_config):
    config = csv_config()
    with open(config.data, "a") as file:
        file.write(f"pairs0.png\t{'x' * 131_072}\n")
    assert max(map(len, open_data(config)._training.source.captions)) == 131_072


@pytest.mark.parametrize("column", ["picture first", "caption first"])
@pytest.mark.parametrize(
    ("opened", "closed", "message"),
    [
        ('"never closed', None, "line 6: a quote opens a field that is not closed"),
        ('"never closed', '"another', "line 6: a quote opens a field that is not closed"),
        (
            '"never closed',
            'closed here"',
            "line 6: a quote opens a field that takes in another row, with the image pic",
        ),
    ],
)
def test_a_quote_takes_in_no_other_row(tmp_path, column, opened, closed, message):
    captions = [f"caption {row}" for row in range(12)]
    captions[4] = opened
    captions[8] = closed or captions[8]
    lines = ["filepath\ttitle"]
    for row, caption in enumerate(captions):
        (tmp_path / f"pic{row}.png").write_bytes(picture(row))
        lines.append(f"pic{row}.png\t{caption}")
    if column == "caption first":
        lines = ["\t".join(reversed(line.split("\t"))) for line in lines]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"pairs.csv, {message}"):
        open_data(DataConfig(str(tmp_path / "pairs.csv"), held_out_pairs=1, batch_size=2))


def test_quotes_that_belong_to_a_caption_are_read(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    captions = {
        '"two\nlines, with a ""quote"""': 'two\nlines, with a "quote"',
        '"Starry Night" by van Gogh': "Starry Night by van Gogh",
        'a 24" screen': 'a 24" screen',
        '"closed at the end"': "closed at the end",
    }
    lines = ["filepath\ttitle", *(f"a.png\t{caption}" for caption in captions)]
    for ending in ("\n", "\r\n", "\r"):
        (tmp_path / "pairs.csv").write_bytes(ending.join(lines).encode())
        source = CsvPairs(str(tmp_path / "pairs.csv"), DataConfig(str(tmp_path / "pairs.csv")))
        assert source.captions == list(captions.values())
        assert list(source.lines) == [2, 4, 5, 6]


@pytest.mark.parametrize("samples_per_epoch", [None, 8])
def test_too_many_held_out_pairs_are_named_as_such(csv_config, samples_per_epoch):
    config = csv_config(held_out_pairs=38, samples_per_epoch=samples_per_epoch)
    with pytest.raises(ValueError, match=r"held_out_pairs: .*a batch of 4 of the 40 pairs .*got 38, which leaves 2"):
        open_data(config)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("instead", "error"),
    [(None, FileNotFoundError), ("folder", IsADirectoryError), pytest.param(UNREADABLE, OSError, marks=needs_proc)],
)
def test_an_image_that_cannot_be_read_while_training_is_an_error_of_one_line(
    csv_config, tmp_path, instead, error, workers
):
    data = open_data(csv_config(workers=workers))
    for row in range(40):
        path = tmp_path / f"pairs{row}.png"
        path.unlink()
        if instead == "folder":
            path.mkdir()
        elif instead:
            path.symlink_to(instead)
    with pytest.raises(error, match=rf"^{tmp_path}/pairs\d+.png: cannot be read: [^\n]*$"):
        next(data.train(0))


@needs_proc
def test_a_csv_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "pairs.csv").symlink_to(UNREADABLE)
    with pytest.raises(OSError, match=rf"^{tmp_path}/pairs.csv: cannot be read: [^\n]*$"):
        open_data(DataConfig(str(tmp_path / "pairs.csv")))


def test_images_do_not_depend_on_the_thread_count(csv_config):
    data = open_data(csv_config())
    with threads(1):
        one = next(data.train(0)).images
    with threads(2):
        assert_identical(next(data.train(0)).images, one)


def test_reading_that_takes_long_shows_its_progress(csv_config, monkeypatch, capfd):
    config = csv_config()
    open_data(config)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("mlip_kernels.data.reading.SECONDS_BEFORE_PROGRESS", 0.0)
    open_data(config)
    shown = capfd.readouterr().err
    assert "reading pairs.csv: 100%" in shown
    assert "choosing held-out pairs: 100%" in shown
