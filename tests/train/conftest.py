"""A tiny run on a tiny CSV, on one thread."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import configuration, write_pairs

from mlip_kernels.testing import threads
from mlip_kernels.train import TrainConfig


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Runs this small are slower on two threads, and only equal numbers of threads are equal bit for bit."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 48 pictures."""
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def tiny(pairs: Path, tmp_path: Path) -> TrainConfig:
    """A run of eight steps with a checkpoint every three."""
    return configuration(pairs, tmp_path / "run")
