"""The digest of the data: the same for the same pairs wherever they lie, another for any other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_sources import picture, write_tar

from mlip_kernels.data import DataConfig, open_data

pytest.importorskip("open_clip", reason="needs the [train] extra")
pytest.importorskip("webdataset", reason="needs the [train] extra")


def digest(config: DataConfig) -> str:
    return open_data(config).digest()


def edited(config: DataConfig, edit: Callable[[list[str]], object]) -> str:
    """The digest after ``edit`` changed the lines of the CSV in place."""
    path = Path(config.data)
    lines = path.read_text().splitlines()
    edit(lines)
    path.write_text("\n".join(lines) + "\n")
    return digest(config)


@pytest.mark.parametrize("form", ["csv", "shards"])
def test_it_depends_neither_on_the_process_nor_on_the_order_of_batches(form, request):
    config = request.getfixturevalue(f"{form}_config")()
    expected = digest(config)
    assert len(bytes.fromhex(expected)) == 32
    assert open_data(replace(config, batch_size=2), 1, 2).digest() == expected
    assert digest(replace(config, seed=1, workers=2)) == expected


@pytest.mark.parametrize("form", ["csv", "shards"])
def test_it_survives_a_move_of_the_folder(form, request, tmp_path, tmp_path_factory):
    config = request.getfixturevalue(f"{form}_config")()
    expected = digest(config)
    other = tmp_path_factory.mktemp("other") / "place"
    shutil.move(tmp_path, other)
    moved = {name: str(getattr(config, name)).replace(str(tmp_path), str(other)) for name in ("data", "held_out")}
    assert digest(replace(config, **{k: v for k, v in moved.items() if v != "None"})) == expected


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: lines.insert(1, lines.pop()),
        lambda lines: lines.pop(),
        lambda lines: lines.append(lines[-1]),
        lambda lines: lines.__setitem__(5, lines[5] + "!"),
        lambda lines: lines.__setitem__(5, lines[6].split("\t")[0] + "\t" + lines[5].split("\t")[1]),
    ],
    ids=["reordered", "removed", "repeated", "another caption", "another picture"],
)
def test_it_tells_an_edited_csv(csv_config, edit):
    config = csv_config()
    assert digest(config) != edited(config, edit)


def test_it_tells_another_split(csv_config, make_csv):
    config = csv_config()
    other = str(make_csv(9, name="other"))
    found = [digest(c) for c in (config, replace(config, held_out_pairs=7), replace(config, held_out=other))]
    assert len(set(found)) == 3


def test_it_tells_shards_of_other_names_sizes_and_number(shards_config, tmp_path):
    config = shards_config()
    pattern = str(tmp_path / "train-{000..001}.tar")
    found = [digest(config), digest(replace(config, data=pattern))]
    (tmp_path / "train-002.tar").rename(tmp_path / "train-003.tar")
    found.append(digest(replace(config, data=str(tmp_path / "train-{000,001,003}.tar"))))
    write_tar(tmp_path / "train-003.tar", {"0.png": picture(0), "0.txt": bytes(100_000)})
    found.append(digest(replace(config, data=str(tmp_path / "train-{000,001,003}.tar"))))
    assert len(set(found)) == 4
