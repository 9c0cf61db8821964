"""Which results are the same bits for any number of CPU threads: all that the package's kernels compute."""

from pathlib import Path

import pytest
import torch

import mlip_kernels as mk
from mlip_kernels.testing import assert_identical, gradients, threads

GRID = (14, 14)
TOKENS = GRID[0] * GRID[1]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(channels: int = 96) -> torch.Tensor:
    return random(5, TOKENS, channels)


def merged(x: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return mk.merge_tokens(x, x.detach(), 40, **options)[:2]


FILTER = random(14, 8, 96, 2, seed=1)
IMAGE, TEXT = random(24, 49, 64, seed=2), random(20, 17, 64, seed=3)
FEATURES = random(300, 64, seed=4), random(300, 64, seed=5)
SQUARE = 4 * random(300, 300, seed=6)

KERNELS = {
    "dct": (lambda x: mk.dct(x, grid=GRID), tokens()),
    "idct": (lambda x: mk.idct(x, grid=GRID), tokens()),
    "rfft": (lambda x: mk.rfft(x, grid=GRID), tokens()),
    "irfft": (lambda x: mk.irfft(*mk.rfft(x, grid=GRID), grid=GRID), tokens()),
    "spectral_filter": (lambda x, w: mk.spectral_filter(x, w, grid=GRID), tokens(), FILTER),
    "band_energy": (lambda x: mk.band_energy(x, 4, grid=GRID), tokens()),
    "token_energy": (lambda x: mk.token_energy(x, 0.3, grid=GRID), tokens()),
    "amplitude_phase": (lambda x: mk.amplitude_phase(x, grid=GRID), tokens()),
    "spectral_resize": (lambda x: mk.spectral_resize(x, GRID, (7, 9)), tokens()),
    "weighted_mean": (mk.weighted_mean, tokens(), random(5, TOKENS, seed=7).abs()),
    "merge_tokens": (merged, tokens()),
    "merge_plan": (lambda x: mk.merge_plan(x, 40, max_merges=1).merge(x), tokens()),
    "MergePlan": (lambda x: (lambda plan: plan.unmerge(plan.merge(x)[0]))(mk.merge_plan(x.detach(), 40)), tokens()),
    "token_logits": (mk.token_logits, IMAGE, TEXT),
    "pair_cross_entropy": (mk.pair_cross_entropy, SQUARE),
}
PYTORCHS = {
    "proportional_attention",
    "ClipLoss",
    "SigLipLoss",
    "TokenContrastiveLoss",
    "FrequencyStage",
    "AttentionPool",
}
"""Computed with PyTorch's attention, matrix products and sums, which may split their work by the number of threads."""

NO_TENSORS = {"keep_rate_schedule", "merge_layers", "merge_schedule", "token_counts", "use_reference"}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_give_the_same_bits_for_any_number_of_threads(name):
    function, *inputs = KERNELS[name]

    def results() -> list[torch.Tensor]:
        found = function(*inputs)
        found = [found] if isinstance(found, torch.Tensor) else list(found)
        return [*found, *gradients(function, inputs)]

    with threads(1):
        expected = results()
    for count in (2, 3):
        with threads(count):
            for one, other in zip(results(), expected, strict=True):
                assert_identical(one, other, name=f"{name} on {count} threads")


def test_every_public_function_says_whose_threads_it_uses():
    assert set(KERNELS) | NO_TENSORS | PYTORCHS >= set(mk.__all__)


def test_the_readme_names_what_may_depend_on_the_number_of_threads():
    readme = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    sentence = next(part for part in readme.split("\n\n") if part.startswith('"Deterministic"'))
    for name in PYTORCHS:
        assert f"`{name}`" in sentence
    assert not any(f"`{name}`" in sentence for name in KERNELS)
