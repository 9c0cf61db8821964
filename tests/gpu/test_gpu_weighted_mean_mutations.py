"""Faults planted in the kernels of weighted_mean are caught, each by the check that should catch it.

A mutation changes one place of a kernel's source. The changed copy is compiled and run as the real one is.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import mlip_kernels
from mlip_kernels import _library, use_reference, weighted_mean
from mlip_kernels.testing import assert_as_accurate

PACKAGE = Path(mlip_kernels.__file__).parent
SOURCES = {
    "triton": PACKAGE / "triton" / "merging" / "weighted_mean.py",
    "cuda": PACKAGE.parent / "csrc" / "cuda" / "merging" / "weighted_mean.cu",
}
SHAPES = ((3, 41, 67), (2, 530, 24))  # a tail in every direction; tokens enough to be cut in two
WRONG, NOTHING = "wrong result", "nothing"


@dataclass(frozen=True)
class Mutation:
    """``after`` in the place of ``before`` is seen as ``caught``: a kind of fault, or a wrong result."""

    name: str
    backend: str
    before: str
    after: str
    caught: str


MUTATIONS = (
    Mutation(
        "no mask over the channels that are read",
        "triton",
        "used = (w != 0)[:, None] & (channels < D)[None, :]",
        "used = ((w != 0)[:, None] & (channels < D)[None, :]) | (rows < last)[:, None]",
        "out_of_bounds",
    ),
    Mutation(
        "no mask over the channels of the mean",
        "triton",
        "tl.store(mean + row * D + channels, result.to(mean.dtype.element_ty), mask=channels < D)",
        "tl.store(mean + row * D + channels, result.to(mean.dtype.element_ty))",
        "out_of_bounds",
    ),
    Mutation(
        "no mask over the tokens of the gradient",
        "triton",
        "in_bounds = (rows < N)[:, None] & (channels < D)[None, :]",
        "in_bounds = (rows < N + BLOCK_N)[:, None] & (channels < D)[None, :]",
        "out_of_bounds",
    ),
    Mutation(
        "weights of the next token",
        "triton",
        "return tl.load(weight + batch * N + rows, mask=mask, other=0.0)",
        "return tl.load(weight + batch * N + rows + 1, mask=mask, other=0.0)",
        "out_of_bounds",
    ),
    Mutation(
        "one split too few",
        "triton",
        "for split in range(0, splits):",
        "for split in range(1, splits):",
        WRONG,
    ),
    Mutation(
        "prefix taken in",
        "triton",
        "first = prefix + split * length",
        "first = split * length",
        WRONG,
    ),
    Mutation(
        "garbage of weight 0 taken in",
        "triton",
        "tl.where(used[:, None] | finite, values, 0.0)",
        "values",
        WRONG,
    ),
    Mutation(
        "gradient of the weight short of its last tokens",
        "triton",
        "tl.store(grad_weight + batch * N + rows, value, mask=rows < N)",
        "tl.store(grad_weight + batch * N + rows, value, mask=rows < N - 1)",
        WRONG,
    ),
    Mutation(
        "no barrier before the sums of the warps are added",
        "cuda",
        "shared_weights[threadIdx.y] = weights;\n  __syncthreads();",
        "shared_weights[threadIdx.y] = weights;",
        "shared_race",
    ),
    Mutation(
        "no barrier before the products are centred",
        "cuda",
        "shared[threadIdx.x / WARP] = sum;\n  __syncthreads();",
        "shared[threadIdx.x / WARP] = sum;",
        "shared_race",
    ),
    Mutation(
        "barrier that only some threads reach",
        "cuda",
        "shared[threadIdx.x / WARP] = sum;\n  __syncthreads();",
        "shared[threadIdx.x / WARP] = sum;\n  if (threadIdx.x < WARP) __syncthreads();",
        "shared_race",
    ),
    Mutation(
        "no bound on the channels that are read",
        "cuda",
        "if (weight[r] != 0.0f && channel < p.channels) load<V>",
        "if (weight[r] != 0.0f) load<V>",
        "out_of_bounds",
    ),
    Mutation(
        "no bound on the channels that are written",
        "cuda",
        "if (first_channel + c >= p.channels) break;",
        "",
        "out_of_bounds",
    ),
    Mutation(
        "no bound on the elements that are finished",
        "cuda",
        "if (i >= p.batch * p.channels) return;",
        "",
        "out_of_bounds",
    ),
    Mutation(
        "one token too many",
        "cuda",
        "weight[r] = n + r * WARPS < last ?",
        "weight[r] = n + r * WARPS <= last ?",
        "out_of_bounds",
    ),
    Mutation(
        "weights of the next token",
        "cuda",
        "p.weight[b * p.tokens + n]",
        "p.weight[b * p.tokens + n + 1]",
        "out_of_bounds",
    ),
    Mutation(
        "sums of the next warp",
        "cuda",
        "sum += shared_sums[warp][c];",
        "sum += shared_sums[warp + 1][c];",
        "out_of_bounds",
    ),
    Mutation(
        "one split too few",
        "cuda",
        "for (int64_t split = 0; split < p.splits; ++split)",
        "for (int64_t split = 1; split < p.splits; ++split)",
        WRONG,
    ),
    Mutation(
        "garbage of weight 0 taken in",
        "cuda",
        "(unused && !isfinite(values[v]) ? 0.0f : values[v])",
        "values[v]",
        WRONG,
    ),
    Mutation(
        "lanes added over half a warp",
        "cuda",
        "if (n < p.prefix) continue;",
        "if (n < p.prefix || (threadIdx.x & 16)) continue;",
        "divergent_warp",
    ),
)
SOUND = (
    Mutation("unchanged", "triton", "", "", NOTHING),
    Mutation("unchanged", "cuda", "", "", NOTHING),
)


def mutated(mutation):
    """The source with the mutation; it must be there, and only once."""
    source = SOURCES[mutation.backend].read_text(encoding="utf-8")
    if mutation.before:
        assert source.count(mutation.before) == 1, f"{mutation.name}: not once in {SOURCES[mutation.backend]}"
        source = source.replace(mutation.before, mutation.after)
    return source


def device(mutation, folder, monkeypatch):
    """An emulated GPU whose kernels of weighted_mean have the mutation."""
    from emulated_cuda import EmulatedCuda

    if mutation.backend == "cuda":
        changed = folder / SOURCES["cuda"].name
        write(changed, mutated(mutation))
        return EmulatedCuda("cuda", 80, sources={SOURCES["cuda"]: changed})
    module = f"weighted_mean_{folder.name}"
    write(folder / f"{module}.py", mutated(mutation))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, module, raising=False)
    for name, launcher in list(_library._triton_kernels.items()):
        if name.startswith("merging_weighted_mean"):
            monkeypatch.setitem(_library._triton_kernels, name, f"{module}:{launcher.partition(':')[2]}")
    return EmulatedCuda("triton", 80)


def write(file, text):
    """Leave a file alone that is right already, and with it what was compiled from it."""
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def results(shape, *, put=torch.Tensor.detach):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator), torch.rand(shape[:2], generator=generator)
    weight[:, 3], x[:, 3] = 0, float("nan")
    leaves = [put(tensor).requires_grad_() for tensor in (x, weight)]
    mean = weighted_mean(*leaves, prefix_tokens=1)
    cotangent = torch.randn(mean.shape, generator=generator)
    return [mean, *torch.autograd.grad(mean, leaves, cotangent)]


def outcome(cuda):
    """How a run ends: the kinds of its faults, or a wrong result, or nothing to be said."""
    from ptx_emulator import EmulatorError

    for shape in SHAPES:
        with use_reference():
            baseline, truth = results(shape), results(shape, put=torch.Tensor.double)
        try:
            with cuda:
                found = results(shape)
        except EmulatorError as failure:
            return failure.kinds
        try:
            for three in zip(found, baseline, truth, strict=True):
                assert_as_accurate(*three)
        except AssertionError:
            return {WRONG}
    return {NOTHING}


@pytest.mark.parametrize("mutation", [*SOUND, *MUTATIONS], ids=lambda m: f"{m.backend}-{m.name.replace(' ', '_')}")
def test_planted_faults_are_caught(mutation, needs_emulated, request, monkeypatch):
    needs_emulated(mutation.backend)
    cuda = device(mutation, request.config.cache.mkdir(f"mutation_{number(mutation)}"), monkeypatch)
    assert mutation.caught in outcome(cuda)


def number(mutation):
    return [*SOUND, *MUTATIONS].index(mutation)


def test_a_mutation_of_text_that_is_gone_is_an_error():
    with pytest.raises(AssertionError, match="not once in"):
        mutated(replace(MUTATIONS[0], before="no such line"))
