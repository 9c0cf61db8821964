"""What only the CUDA C++ kernels of the spectral family do, and planted faults that are caught."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from spectral_operators import filters, results, tokens

import mlip_kernels
from mlip_kernels import use_reference
from mlip_kernels.testing import assert_as_accurate, assert_identical

SOURCE = Path(mlip_kernels.__file__).parents[1] / "csrc" / "cuda" / "spectral" / "spectral.cu"
ARCHITECTURES = (80, 90)
WRONG, NOTHING = "wrong result", "nothing"


@pytest.fixture(params=ARCHITECTURES, ids="sm{}".format)
def cuda(request, needs_emulated):
    needs_emulated("cuda")
    from emulated_cuda import EmulatedCuda

    return EmulatedCuda("cuda", request.param, multiprocessors=1)  # so that blocks go through several batch elements


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


def misaligned(tensor):
    """The same numbers, one element behind where torch would put them."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)


@pytest.mark.parametrize("channels", [31, 28], ids=["odd", "vectors"])
@pytest.mark.parametrize("basis", ["dct", "rfft"])
def test_what_shared_memory_has_no_room_to_keep_changes_no_bit(basis, channels, needs_emulated):
    needs_emulated("cuda")
    from emulated_cuda import EmulatedCuda

    def function(x, weight):
        return mlip_kernels.spectral_filter(x, weight, grid=(14, 14), basis=basis, prefix_tokens=1)

    x, weight = tokens(17, 197, channels), filters(196, channels, (14, 14), basis)
    small, large = (EmulatedCuda("cuda", 80, multiprocessors=1, sized_as=arch) for arch in (75, 90))
    both = []
    for device, put in ((small, small.put), (large, misaligned)):
        with device:
            both.append([t.cpu() for t in results(function, [x, weight], put)])
    shared = [[launch.shared for launch in device.launches] for device in (small, large)]
    assert all(little < much for little, much in zip(*shared, strict=True) if much)  # the finishing kernel has none
    for one, other in zip(*both, strict=True):
        assert_identical(one, other)
    with use_reference():
        baseline, truth = (results(function, inputs) for inputs in ((x, weight), (x.double(), weight.double())))
    for three in zip(both[0], baseline, truth, strict=True):
        assert_as_accurate(*three)


@pytest.mark.parametrize("basis", ["dct", "rfft"])
def test_weights_at_any_address(basis, needs_emulated):
    needs_emulated("cuda")
    from emulated_cuda import EmulatedCuda

    x, weight = tokens(2, 12, 36), filters(12, 36, (3, 4), basis)
    with EmulatedCuda("cuda", 80) as cuda:  # one batch element for each block, so aligned weights are not kept
        one, other = (
            mlip_kernels.spectral_filter(x, w, grid=(3, 4), basis=basis) for w in (weight, misaligned(weight))
        )
    assert cuda.launches[0].shared < cuda.launches[1].shared
    assert_identical(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [16, 15], ids=["vectors", "odd"])
def test_more_bands_than_shared_memory_keeps(channels, dtype, needs_emulated):
    needs_emulated("cuda")
    from emulated_cuda import EmulatedCuda

    x, bands = tokens(2, 196, channels, dtype=dtype), torch.arange(196).flip(0).reshape(14, 14)

    def function(x):
        return mlip_kernels.band_energy(x, bands, grid=(14, 14))

    cuda = EmulatedCuda("cuda", 80, multiprocessors=1, sized_as=75)
    with cuda:
        found = results(function, [x], cuda.put)
    assert 31 << 10 < cuda.launches[-1].shared <= 32 << 10  # what lets two blocks share 64 KiB
    with use_reference():
        baseline, truth = results(function, [x]), results(function, [x.double()])
    for three in zip([t.cpu() for t in found], baseline, truth, strict=True):
        assert_as_accurate(*three)


@dataclass(frozen=True)
class Mutation:
    """``after`` in the place of ``before`` is seen as ``caught``, in a filter or in the gradient of its weight."""

    name: str
    before: str
    after: str
    caught: str


MUTATIONS = (
    Mutation("nothing", "", "", NOTHING),
    Mutation("no barrier between passes", "  __syncthreads();\n}\n\n// All that", "}\n\n// All that", "shared_race"),
    Mutation("line replaced too early", "__syncwarp();  // the line has been read", "// the line", "warp_race"),
    Mutation("no bound on channels", "if (in_bounds) sums[position]", "sums[position]", "out_of_bounds"),
    Mutation("sums start again", "b == blockIdx.y);", "true);", WRONG),
    Mutation("weights not waited for", "__pipeline_wait_prior(0);", "", "async_copy"),
    Mutation("no barrier behind weights", "    __syncthreads();\n    for (int s", "    for (int s", "shared_race"),
    Mutation("no bound on elements", "if (i >= count) return;", "", "out_of_bounds"),
    Mutation("one split too few", "int64_t split = 0;", "int64_t split = 1;", WRONG),
)


def mutated(mutation, folder):
    """The source with its headers and the mutation; kernels of other operators are left empty."""
    from emulated_cuda.cuda_library import inlined

    source = inlined(SOURCE)
    if mutation.before:
        assert source.count(mutation.before) == 1, f"{mutation.name}: not once in the sources"
        source = source.replace(mutation.before, mutation.after)
    source = re.sub(r"  run_passes<(?!FILTERED>|WEIGHT_GRADIENT>)\w+>\(p, .*\n", "", source)
    file = folder / SOURCE.name
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
    cuda = EmulatedCuda("cuda", 80, multiprocessors=1, sources={SOURCE: mutated(mutation, folder)})
    x, weight = tokens(20, 21, 35), filters(20, 35, (4, 5), "rfft")
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
