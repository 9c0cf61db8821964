"""The disk fills up at each write in turn: the run names the file, and continues once there is room."""

import contextlib
import dataclasses
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_run

from mlip_kernels.testing import assert_identical, threads
from mlip_kernels.train import checkpoint, files, logs, train


class Disk:
    """Counts what a run asks of the disk, and has no room from request ``limit`` on."""

    def __init__(self, limit: float = float("inf")) -> None:
        self.requests, self.limit = 0, limit

    def request(self) -> None:
        self.requests += 1
        if self.requests > self.limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        """Serve the writes and renamings of the trainer."""

        class File(io.FileIO):
            def write(file, data) -> int:  # noqa: N805  # self is the disk
                if self.requests == self.limit and len(data) > 1:  # room for a part: a short write, then none
                    self.requests += 1
                    return super().write(memoryview(data)[: len(data) // 2])
                self.request()
                return super().write(data)

        def passing(call):
            def requested(*arguments):
                self.request()
                return call(*arguments)

            return requested

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "open_binary", lambda path, mode: io.BufferedWriter(File(path, mode), 1 << 23))
            patch.setattr(os, "replace", passing(os.replace))
            yield


def results(config) -> tuple[dict, list]:
    last = checkpoint.checkpoints(Path(config.output) / "checkpoints")[-1]
    rows = logs.read(Path(config.output) / "metrics.csv")
    return checkpoint.load(last)["model"], [row for row in rows if row[1] != "pairs_per_second"]


def test_each_failing_write_ends_the_run_by_name_and_loses_nothing(tmp_path):
    config = tiny_run.configuration(tiny_run.write_pairs(tmp_path), tmp_path / "whole")
    narrow = dataclasses.replace(
        config.model,
        image=dataclasses.replace(config.model.image, width=8, heads=1),
        text=dataclasses.replace(config.model.text, width=8, heads=1),
    )
    config = dataclasses.replace(
        config, model=narrow, steps=2, checkpoint_every=1, keep_checkpoints=1, held_out_pairs=2
    )
    disk = Disk()
    with threads(1), disk.mounted():
        train(config)
    weights, rows = results(config)
    assert disk.requests > 8
    for limit in range(disk.requests):
        run = dataclasses.replace(config, output=str(tmp_path / f"full-{limit}"), resume=True)
        with threads(1):
            with Disk(limit).mounted(), pytest.raises(OSError, match="No space left on device") as failure:
                train(run)
            assert str(failure.value.filename).startswith(run.output), limit
            assert files.WRITING not in str(failure.value.filename)
            train(run)
        again, rows_again = results(run)
        assert rows_again == rows, limit
        for name, weight in weights.items():
            assert_identical(again[name], weight, name=f"{limit}: {name}")
