"""The kernels of filter and energies against their reference: what blocking, tails, threads and dtypes could break."""

import os
import subprocess
import sys

import instruction_sets
import pytest
import torch

from mlip_kernels._library import LOADED
from mlip_kernels.spectral import plain as reference
from mlip_kernels.spectral.constants import compute_dtype, cosine_matrices, dct_matrix, fourier_matrices
from mlip_kernels.testing import (
    DTYPES,
    assert_as_accurate,
    assert_close,
    assert_identical,
    permuted,
    threads,
    uninitialized_memory_is_nan,
)

OPERATORS = torch.ops.mlip_kernels
FOURIER = pytest.mark.parametrize("fourier", [True, False], ids=["rfft", "dct"])
NAMES = (
    "filtered",
    "filtered_backward_weight",
    "band_energy",
    "band_energy_backward",
    "token_energy",
    "token_energy_backward",
)
# Batch, grid (None: token axis of this length), channels, prefix tokens. Channels leave tails behind every vector
# width and fill one block, several, or none; sides are even, odd, prime, one.
PROBLEMS = (
    (2, (7, 7), 17, 0),
    (1, (7, 8), 3, 1),
    (2, (8, 7), 65, 5),
    (3, (14, 14), 33, 1),
    (1, (16, 16), 96, 0),
    (1, (13, 11), 130, 2),
    (1, (24, 27), 1, 0),
    (2, (1, 1), 16, 0),
    (2, (1, 6), 5, 1),
    (2, (9, 1), 5, 1),
    (0, (7, 7), 17, 0),
    (2, 1, 4, 0),
    (2, 2, 31, 1),
    (2, 49, 66, 1),
    (1, 50, 64, 0),
    (2, 197, 19, 0),
    (1, 196, 100, 5),
)

EVERY_DTYPE = PROBLEMS[1:4] + PROBLEMS[10:15]


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def matrices_of(like, grid, height, width, fourier):
    if fourier:
        return fourier_matrices(like, height, width, grid, "ortho")
    return cosine_matrices(like, dct_matrix, height, width, 2, grid, "ortho")


def calls(problem, fourier, dtype):
    """Name -> arguments of the operator, in float64 values that ``dtype`` represents."""
    batch, grid, channels, prefix = problem
    height, width = grid if isinstance(grid, tuple) else (1, grid)
    grid = grid if isinstance(grid, tuple) else None
    columns = width // 2 + 1 if fourier else width
    like = torch.empty(0, 0, 0, dtype=dtype)
    wide = compute_dtype(like)

    def tokens(seed):
        return random(batch, prefix + height * width, channels, dtype=dtype, seed=seed)

    generator = torch.Generator().manual_seed(7)
    weight = random(height, columns, channels, *((2,) if fourier else ()), dtype=wide, seed=1)
    bands = torch.randint(4, (height * columns,), generator=generator, dtype=torch.int32)
    kept = torch.randint(2, (height, columns), generator=generator).to(wide)
    kept = kept[..., None] if fourier else kept
    matrices = (*matrices_of(like, grid, height, width, fourier), height, width, prefix)
    return {
        "filtered": (tokens(0), weight, *matrices),
        "filtered_backward_weight": (tokens(0), tokens(2), *matrices, fourier),
        "band_energy": (tokens(0), bands, 5, *matrices, fourier),
        "band_energy_backward": (random(batch, 5, channels, dtype=dtype, seed=3), tokens(0), bands, *matrices, fourier),
        "token_energy": (tokens(0), kept, *matrices),
        "token_energy_backward": (random(batch, prefix + height * width, dtype=wide), tokens(0), kept, *matrices),
    }


def operator(name):
    return getattr(OPERATORS, f"spectral_{name}").default


def widened(arguments):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def assert_right(name, arguments, problem):
    with uninitialized_memory_is_nan():
        found = operator(name)(*arguments)
    plain = getattr(reference, name)
    expected, truth = plain(*arguments), plain(*widened(arguments))
    assert found.dtype == expected.dtype
    assert found.is_contiguous()
    if found.dtype == torch.float64:  # its own truth
        assert_close(found, expected, roundings=32, name=f"{name} {problem}")
    else:
        assert_as_accurate(found, expected, truth, name=f"{name} {problem}")


@FOURIER
@pytest.mark.parametrize(
    ("problem", "dtype"),
    [(problem, dtype) for problem in PROBLEMS for dtype in DTYPES if dtype == torch.float32 or problem in EVERY_DTYPE],
    ids=str,
)
def test_results_are_as_accurate_as_pytorch(problem, dtype, fourier):
    for name, arguments in calls(problem, fourier, dtype).items():
        assert_right(name, arguments, problem)


@FOURIER
@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name, fourier):
    def beside_others(tensor):  # neighbours that must not be read or written: NaN all around
        padded = torch.full([n + 3 for n in tensor.shape], float("nan"), dtype=tensor.dtype)
        inside = padded[tuple(slice(1, n + 1) for n in tensor.shape)]
        return inside.copy_(tensor)

    arguments = calls((2, (7, 8), 35, 1), fourier, torch.float32)[name]
    expected = operator(name)(*arguments)
    for layout in (permuted, beside_others):
        strided = [layout(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
        assert not any(a.is_contiguous() for a in strided if isinstance(a, torch.Tensor) and a.is_floating_point())
        assert_identical(operator(name)(*strided), expected)


@FOURIER
@pytest.mark.parametrize("name", NAMES)
def test_the_prefix_takes_no_part_whatever_it_holds(name, fourier):
    arguments = calls((2, (7, 8), 35, 3), fourier, torch.bfloat16)[name]
    poisoned = [
        a.index_fill(1, torch.arange(3), float("nan")) if isinstance(a, torch.Tensor) and a.shape[1:2] == (59,) else a
        for a in arguments
    ]
    expected, found = operator(name)(*arguments), operator(name)(*poisoned)
    if name == "filtered":
        assert found[:, :3].isnan().all()
        assert_identical(expected[:, :3], arguments[0][:, :3])
        expected, found = expected[:, 3:], found[:, 3:]
    elif found.shape[1] == 59:
        assert not found[:, :3].any()
    assert_identical(found, expected)


@FOURIER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_threads_does_not_change_a_bit(name, dtype, fourier):
    for problem in ((19, (7, 8), 300, 1), (3, 197, 130, 0)):
        arguments = calls(problem, fourier, dtype)[name]
        with threads(1):
            expected = operator(name)(*arguments)
        for count in (2, 3):
            with threads(count):
                assert_identical(operator(name)(*arguments), expected)


# The result of the larger one is written past the caches, those of its parts are not.
@pytest.mark.parametrize("problem", [(5, (7, 8), 70, 1), (5, (24, 23), 400, 1)], ids=str)
@FOURIER
@pytest.mark.parametrize("name", NAMES)
def test_each_batch_element_is_computed_alone(name, fourier, problem):
    arguments = calls(problem, fourier, torch.float32)[name]
    whole = operator(name)(*arguments)
    parts = []
    for b in range(5):
        alone = [a[b : b + 1] if isinstance(a, torch.Tensor) and a.shape[0] == 5 else a for a in arguments]
        parts.append(operator(name)(*alone))
    if name == "filtered_backward_weight":
        assert_close(whole, torch.stack(parts).sum(0))
    else:
        assert_identical(torch.cat(parts), whole)


@pytest.mark.parametrize("width", [6, 7, 14, 24])
@pytest.mark.parametrize("height", [5, 8])
def test_a_filter_equals_the_layer_of_gfnet(height, width):
    x, grad = random(3, height * width, 37), random(3, height * width, 37, seed=1)
    weight = random(height, width // 2 + 1, 37, 2, seed=2).requires_grad_()
    x.requires_grad_()
    spectrum = torch.fft.rfft2(x.view(3, height, width, 37), dim=(1, 2), norm="ortho") * torch.view_as_complex(weight)
    y = torch.fft.irfft2(spectrum, s=(height, width), dim=(1, 2), norm="ortho").reshape(x.shape)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    matrices = (*fourier_matrices(x, height, width, (height, width), "ortho"), height, width, 0)
    x, weight = x.detach(), weight.detach()
    assert_close(OPERATORS.spectral_filtered(x, weight, *matrices), y, roundings=32)
    conjugate = weight * torch.tensor([1.0, -1.0])
    assert_close(OPERATORS.spectral_filtered(grad, conjugate, *matrices), grad_x, roundings=32)
    found = OPERATORS.spectral_filtered_backward_weight(grad, x, *matrices, True)
    for column in {0, 1, width // 2}:
        assert_close(found[:, column], grad_weight[:, column], roundings=32, name=f"column {column}")
    assert_close(found, grad_weight, roundings=32)


def test_the_weight_gradient_of_a_large_batch_keeps_its_accuracy():
    x = torch.ones(3000, 4, 3) + random(3000, 4, 3, dtype=torch.float32) / 8
    matrices = (*fourier_matrices(x, 2, 2, (2, 2), "ortho"), 2, 2, 0, True)
    found = OPERATORS.spectral_filtered_backward_weight(x, x, *matrices)
    expected = reference.filtered_backward_weight(x, x, *matrices)
    truth = reference.filtered_backward_weight(*widened((x, x, *matrices)))
    assert_as_accurate(found, expected, truth)


@FOURIER
def test_bands_without_a_number_are_left_out(fourier):
    x, bands, *rest = calls((2, (4, 6), 20, 0), fourier, torch.float32)["band_energy"]
    bands = bands.clone()
    bands[1], bands[-1] = -1, 1 << 30
    assert_close(OPERATORS.spectral_band_energy(x, bands, *rest), reference.band_energy(x, bands, *rest))
    grad = random(2, 5, 20, dtype=torch.float32)
    arguments = (grad, x, bands, *rest[1:])
    assert_close(OPERATORS.spectral_band_energy_backward(*arguments), reference.band_energy_backward(*arguments))


@pytest.mark.skipif(LOADED["cpu"] != "ok", reason="needs the compiled CPU part: pip install .")
@FOURIER
@pytest.mark.parametrize("name", NAMES)
def test_direct_calls_cannot_read_outside_their_tensors(name, fourier):
    arguments = list(calls((2, (3, 4), 5, 1), fourier, torch.float32)[name])
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            tokens = argument.dim() == 3 and argument.shape[1] == 13  # with fewer channels they can be right
            shorter = [] if tokens else [argument[..., :-1]]
            for wrong in (*shorter, argument[None], argument.to(torch.int8)):
                with pytest.raises((RuntimeError, ValueError)):
                    operator(name)(*arguments[:i], wrong, *arguments[i + 1 :])


CAPABILITY_CHECK = """
import torch
import test_spectral_filter_kernels as tests
from mlip_kernels.env import cpu_capability

for problem in ((2, (7, 8), 67, 1), (1, 50, 19, 2)):
    for dtype in tests.DTYPES[:3]:
        for fourier in (True, False):
            for name, arguments in tests.calls(problem, fourier, dtype).items():
                tests.assert_right(name, arguments, problem)
print(cpu_capability())
"""


@pytest.mark.parametrize("capability", instruction_sets.smaller())
def test_every_instruction_set_is_as_accurate(capability):
    paths = os.pathsep.join(filter(None, sys.path))  # among them what pytest's settings add
    environment = {**os.environ, "MLIP_KERNELS_CPU_CAPABILITY": capability, "PYTHONPATH": paths}
    here = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", CAPABILITY_CHECK], env=environment, cwd=here, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == capability


@FOURIER
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, permuted])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_leave_arguments_alone_and_return_memory_of_their_own(name, layout, fourier):
    for problem in ((2, (3, 4), 5, 1), (2, 6, 5, 0)):
        arguments = calls(problem, fourier, torch.float32)[name]
        arguments = [layout(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(operator(name), tuple(arguments), test_utils="test_schema")
