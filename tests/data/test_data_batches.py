"""Training batches are a pure function of configuration, process, epoch and number, for every kind of source."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch

from mlip_kernels.data import Batch, DataConfig, open_data
from mlip_kernels.testing import assert_identical

pytest.importorskip("open_clip", reason="needs the [train] extra")
pytest.importorskip("webdataset", reason="needs the [train] extra")

CORRUPT = (3, 4, 11, 17, 19)


@pytest.fixture(params=["csv", "shards"])
def config(request: pytest.FixtureRequest) -> Callable[..., DataConfig]:
    return request.getfixturevalue(f"{request.param}_config")


def assert_same(actual: Iterable[Batch], expected: Iterable[Batch]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.captions == other.captions
        assert_identical(one.images, other.images)
        assert_identical(one.text, other.text)


def test_batches_are_full_and_typed(config):
    data = open_data(config())
    batches = list(data.train(0))
    assert len(batches) == data.batches_per_epoch == 8
    for images, text, captions in batches:
        assert images.shape == (4, 3, 16, 16)
        assert images.dtype == torch.float32
        assert text.shape == (4, 24)
        assert text.dtype == torch.int64
        assert len(captions) == 4


@pytest.mark.parametrize("corrupt", [(), CORRUPT])
def test_batches_do_not_depend_on_workers(config, corrupt):
    plain = config(corrupt)
    expected = list(open_data(plain).train(1))
    for workers in (1, 2):
        assert_same(open_data(replace(plain, workers=workers)).train(1), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_continues_where_an_interrupted_epoch_stopped(config, workers):
    settings = config(CORRUPT, workers=workers)
    expected = list(open_data(settings).train(2))
    for skip in (1, 5, 8):
        assert_same(open_data(settings).train(2, skip), expected[skip:])


@pytest.mark.parametrize("corrupt", [(), CORRUPT])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_together_see_the_batch_of_one(config, corrupt, world_size):
    settings = config(corrupt, batch_size=4)
    single = open_data(replace(settings, batch_size=4 * world_size))
    parts = [open_data(settings, rank, world_size) for rank in range(world_size)]
    assert {part.batches_per_epoch for part in parts} == {single.batches_per_epoch}
    for whole, *batches in zip(single.train(0), *(part.train(0) for part in parts), strict=True):
        for rank, batch in enumerate(batches):
            assert batch.captions == whole.captions[rank::world_size]
            assert_identical(batch.images, whole.images[rank::world_size])


def test_epochs_differ_in_order_and_augmentation(config):
    data = open_data(config())
    first, second = (list(data.train(epoch)) for epoch in (0, 1))
    images = [{c: i for b in epoch for c, i in zip(b.captions, b.images, strict=True)} for epoch in (first, second)]
    assert [b.captions for b in first] != [b.captions for b in second]
    shared = images[0].keys() & images[1].keys()
    assert shared
    assert any(not torch.equal(images[0][c], images[1][c]) for c in shared)


def test_seed_changes_batches_but_not_the_held_out_pairs(config):
    plain = config()
    data, other = open_data(plain), open_data(replace(plain, seed=1))
    assert next(data.train(0)).captions != next(other.train(0)).captions
    assert_same(data.held_out(4), other.held_out(4))


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_neither_read_nor_changed(config, workers):
    settings = config(workers=workers)
    expected = list(open_data(settings).train(0))
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    data = open_data(settings)
    assert_same(data.train(0), expected)
    assert list(data.held_out(4))
    assert_identical(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_an_epoch_can_be_left_early(config):
    for workers in (0, 2):
        batches = open_data(config(workers=workers)).train(0)
        next(batches)
        batches.close()


def test_held_out_pairs_have_a_fixed_order_and_a_short_last_batch(config):
    data = open_data(config(held_out_pairs=5))
    batches = list(data.held_out(3))
    assert [len(b.captions) for b in batches] == [3, 2]
    assert_same(data.held_out(3), batches)
    assert_identical(torch.cat([b.images for b in data.held_out(2)]), torch.cat([b.images for b in batches]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda data: data.train(-1), ValueError, "epoch: .*>= 0, got -1"),
        (lambda data: data.train("0"), TypeError, "epoch: .*got str"),
        (lambda data: data.train(0, 9), ValueError, r"skip: .*\[0, 8\], got 9"),
        (lambda data: data.held_out(0), ValueError, "batch_size: .*got 0"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(csv_config, call, error, message):
    data = open_data(csv_config())
    with pytest.raises(error, match=message):
        call(data)


def test_wrong_process_numbers_are_refused(csv_config):
    config = csv_config()
    with pytest.raises(ValueError, match=r"rank: .*\[0, 1\], got 2"):
        open_data(config, 2, 2)
    with pytest.raises(ValueError, match=r"world_size: .*got 0"):
        open_data(config, 0, 0)
    with pytest.raises(TypeError, match="config: expected a DataConfig, got dict"):
        open_data({})


def test_too_few_pairs_for_a_batch_are_refused(config):
    with pytest.raises(ValueError, match=r"batch_size: .*32 training pairs .*got 20 on 2 processes"):
        open_data(config(batch_size=20), 0, 2)
