"""The memory of transform matrices: bounded by bytes, the least recently used goes first, safe with threads."""

import threading

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mlip_kernels import spectral
from mlip_kernels.spectral import constants
from mlip_kernels.spectral.constants import Remembered, dct_matrix
from mlip_kernels.testing import assert_identical

CPU = torch.device("cpu")
ONE = 8 * 8 * 4  # bytes of a matrix of 8 points in float32


def ask(memory, n, type=2, dtype=torch.float32):
    return memory(dct_matrix, (n, type, "ortho"), CPU, dtype)


def test_a_hit_returns_the_same_tensor():
    memory = Remembered(10 * ONE)
    assert ask(memory, 8) is ask(memory, 8)
    assert memory.cache_info() == (1, 1, ONE)


def test_the_least_recently_used_go_first_once_the_bytes_are_too_many():
    memory = Remembered(3 * ONE)
    first, second, _ = (ask(memory, 8, type) for type in (1, 2, 3))
    assert ask(memory, 8, 1) is first
    ask(memory, 8, 4)
    assert memory.cache_info().bytes == 3 * ONE
    assert ask(memory, 8, 1) is first
    assert ask(memory, 8, 2) is not second
    ask(memory, 8, 3, torch.float64)  # twice the bytes: two others go
    assert memory.cache_info()[1:] == (2, 3 * ONE)


def test_what_is_larger_than_all_memory_is_not_remembered():
    memory = Remembered(3 * ONE)
    kept = ask(memory, 8)
    assert ask(memory, 16) is not ask(memory, 16)
    assert ask(memory, 8) is kept


def test_clearing_forgets_everything():
    memory = Remembered(3 * ONE)
    ask(memory, 8)
    memory.cache_clear()
    assert memory.cache_info() == (0, 0, 0)


def test_sequences_of_many_lengths_stay_within_the_bound(monkeypatch):
    memory = Remembered(constants.REMEMBERED_BYTES // 64)
    monkeypatch.setattr(constants, "_remembered", memory)
    for n in range(500, 560):
        spectral.rfft(torch.ones(1, n, 1))
        assert memory.cache_info().bytes <= memory.limit
    assert memory.cache_info().bytes > memory.limit / 2  # it is used, too


def test_threads_may_ask_at_once():
    memory, found, failures = Remembered(5 * ONE), [], []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        try:
            for type in torch.randint(1, 5, (200,), generator=generator).tolist():
                found.append((type, ask(memory, 8, type), memory.cache_info().bytes))
                if type == 3:
                    ask(memory, 8, type, torch.float64)
        except Exception as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    expected = {type: dct_matrix(8, type, "ortho", device=CPU).float() for type in (1, 2, 3, 4)}
    for type, matrix, total in found:
        assert_identical(matrix, expected[type])
        assert total <= memory.limit
    assert memory.cache_info().bytes == sum(entry[0].untyped_storage().nbytes() for entry in memory._entries.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mode_that_looks_on_sees_what_is_remembered(dtype):
    """Selective checkpointing saves or recomputes every operator: matrices must not be among them."""
    constants._remembered.cache_clear()
    x, seen = torch.ones(1, 6, 2, dtype=dtype, requires_grad=True), []

    def policy(context, operator, *arguments, **options):
        seen.append(str(operator))
        return CheckpointPolicy.PREFER_RECOMPUTE

    y = checkpoint(
        spectral.dct, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    y.sum().backward()
    assert seen
    assert not [name for name in seen if "cos" in name or "arange" in name]
    assert constants._remembered.cache_info().misses == 1
