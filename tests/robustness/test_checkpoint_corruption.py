"""A corrupted checkpoint is refused by name, or loads as the one that was written."""

import random
from collections.abc import Callable

import pytest
import torch

from mlip_kernels.testing import assert_identical
from mlip_kernels.train import checkpoint

CORRUPTIONS = 100


def flip(content: bytearray, source: random.Random) -> None:
    content[source.randrange(len(content))] ^= 1 << source.randrange(8)


def truncate(content: bytearray, source: random.Random) -> None:
    del content[source.randrange(len(content)) :]


def zero(content: bytearray, source: random.Random) -> None:
    start = source.randrange(len(content))
    end = min(len(content), start + source.randrange(1, 4096))
    content[start:end] = bytes(end - start)


def overwrite(content: bytearray, source: random.Random) -> None:
    start = source.randrange(len(content))
    end = min(len(content), start + source.randrange(1, 512))
    content[start:end] = source.randbytes(end - start)


def repeat(content: bytearray, source: random.Random) -> None:
    start = source.randrange(len(content))
    content[start:start] = content[start : start + source.randrange(1, 512)]


def append(content: bytearray, source: random.Random) -> None:
    content += source.randbytes(source.randrange(1, 512))


@pytest.mark.parametrize("corrupt", [flip, truncate, zero, overwrite, repeat, append], ids=lambda how: how.__name__)
def test_corruption_is_refused_or_harmless(tmp_path, corrupt: Callable[[bytearray, random.Random], None]):
    generator, source = torch.Generator().manual_seed(0), random.Random(0)
    weights = {f"layer {number}": torch.randn(7, number + 1, generator=generator) for number in range(20)}
    path = checkpoint.save(tmp_path, 1, {"step": 1, "model": weights}, keep=1)
    whole, refusals = path.read_bytes(), []
    for _ in range(CORRUPTIONS):
        content = bytearray(whole)
        corrupt(content, source)
        path.write_bytes(content)
        try:
            loaded = checkpoint.load(path)
        except ValueError as failure:
            refusals.append(str(failure))
        else:
            assert loaded["step"] == 1
            for name, value in weights.items():
                assert_identical(loaded["model"][name], value, name=name)
    assert len(refusals) > CORRUPTIONS // 2  # zeros over zeros change nothing
    assert all(refusal.startswith(f"{path}: ") and "\n" not in refusal for refusal in refusals)
