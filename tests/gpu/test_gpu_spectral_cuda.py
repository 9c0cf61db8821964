"""What only the CUDA C++ kernels of the spectral family do, and planted faults that are caught."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from spectral_operators import filters, tokens

import mlip_kernels
from mlip_kernels import use_reference
from mlip_kernels.testing import assert_as_accurate

SOURCES = Path(mlip_kernels.__file__).parents[1] / "csrc" / "cuda" / "spectral"
ARCHITECTURES = (80, 90)
WRONG, NOTHING = "wrong result", "nothing"


@pytest.fixture(params=ARCHITECTURES, ids="sm{}".format)
def cuda(request, needs_emulated):
    needs_emulated("cuda")
    from emulated_cuda import EmulatedCuda

    return EmulatedCuda("cuda", request.param)


def test_half_a_spectrum_of_more_rows_than_registers_hold(cuda):
    x, weight = tokens(1, 17 * 6, 8), tokens(17, 4, 8, 2)
    with cuda:
        found = mlip_kernels.spectral_filter(cuda.put(x), cuda.put(weight), grid=(17, 6)).cpu()
    with use_reference():
        baseline = mlip_kernels.spectral_filter(x, weight, grid=(17, 6))
        truth = mlip_kernels.spectral_filter(x.double(), weight.double(), grid=(17, 6))
    assert_as_accurate(found, baseline, truth)


def test_what_shared_memory_cannot_hold_is_kept_in_a_workspace(cuda):
    from emulated_cuda.launch import MOST_SHARED

    x = tokens(1, 36 * 38, 8)
    with cuda:
        found = mlip_kernels.dct(cuda.put(x), grid=(36, 38)).cpu()
    with use_reference():
        baseline, truth = mlip_kernels.dct(x, grid=(36, 38)), mlip_kernels.dct(x.double(), grid=(36, 38))
    assert_as_accurate(found, baseline, truth)
    tile = 36 * 38 * 32 * 4
    assert (cuda.launches[-1].shared > tile) == (tile < MOST_SHARED[cuda.arch])


@dataclass(frozen=True)
class Mutation:
    """``after`` in the place of ``before``, in the stages or the kernels, is seen as ``caught``."""

    name: str
    before: str
    after: str
    caught: str


MUTATIONS = (
    Mutation("nothing", "", "", NOTHING),
    Mutation(
        "no barrier between stages", "  __syncthreads();\n}\n\n// All of a map", "}\n\n// All of a map", "shared_race"
    ),
    Mutation("line replaced too early", "__syncwarp();  // the line has been read", "// the line", "warp_race"),
    Mutation("no bound on channels", "if (channel + v >= map.channels) return;", "", "out_of_bounds"),
    Mutation("no bound on elements", "if (i >= count) return;", "", "out_of_bounds"),
    Mutation("one split too few", "int64_t split = 0;", "int64_t split = 1;", WRONG),
)


def mutated(mutation, folder):
    """A copy of the kernels of the gradient of a filter's weight, with the stages in it, and with the mutation."""
    kernels = (SOURCES / "filtered_backward_weight.cu").read_text(encoding="utf-8")
    stages = (SOURCES / "stages.cuh").read_text(encoding="utf-8").replace("#pragma once\n", "")
    source = kernels.replace('#include "cuda/spectral/stages.cuh"\n', stages)
    if mutation.before:
        assert source.count(mutation.before) == 1, f"{mutation.name}: not once in the sources"
        source = source.replace(mutation.before, mutation.after)
    file = folder / "filtered_backward_weight.cu"
    if not file.exists() or file.read_text(encoding="utf-8") != source:
        file.write_text(source, encoding="utf-8")
    return file


def gradient_of_weight(x, weight, put=torch.Tensor.detach):
    weight = put(weight).requires_grad_()
    y = mlip_kernels.spectral_filter(put(x), weight, grid=(4, 5), prefix_tokens=1)
    return torch.autograd.grad(y, weight, torch.ones_like(y))[0]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name.replace(" ", "_"))
def test_planted_faults_are_caught(mutation, needs_emulated, request):
    needs_emulated("cuda")
    from emulated_cuda import EmulatedCuda
    from ptx_emulator import EmulatorError

    folder = request.config.cache.mkdir(f"spectral_mutation_{MUTATIONS.index(mutation)}")
    original = SOURCES / "filtered_backward_weight.cu"
    cuda = EmulatedCuda("cuda", 80, sources={original: mutated(mutation, folder)})
    x, weight = tokens(3, 21, 35), filters(20, 35, (4, 5), "rfft")
    with use_reference():
        baseline, truth = gradient_of_weight(x, weight), gradient_of_weight(x.double(), weight.double())
    try:
        with cuda:
            found = gradient_of_weight(x, weight, cuda.put).cpu()
        assert_as_accurate(found, baseline, truth)
        outcome = {NOTHING}
    except EmulatorError as failure:
        outcome = failure.kinds
    except AssertionError:
        outcome = {WRONG}
    assert mutation.caught in outcome
