"""The linear maps separable, analysis and synthesis: every length and symmetry, every layout, every instruction set."""

import os
import subprocess
import sys

import instruction_sets
import pytest
import torch

from mlip_kernels._library import LOADED
from mlip_kernels.spectral import constants
from mlip_kernels.spectral import plain as reference
from mlip_kernels.testing import (
    DTYPES,
    assert_as_accurate,
    assert_close,
    assert_identical,
    permuted,
    threads,
    uninitialized_memory_is_nan,
)

SEPARABLE = torch.ops.mlip_kernels.spectral_separable.default
ANALYSIS = torch.ops.mlip_kernels.spectral_analysis.default
SYNTHESIS = torch.ops.mlip_kernels.spectral_synthesis.default
REFERENCE = {SEPARABLE: reference.separable, ANALYSIS: reference.analysis, SYNTHESIS: reference.synthesis}

COMPILED = (7, 8, 14, 16, 24, 27, 32)  # lengths with code of their own
LENGTHS = (*range(1, 34), 49, 50, 64, 77, 196, 197, 256, 257, 576, 577)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems would spend their time waiting for a second one."""
    with threads(1):
        yield


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def fourier(height, width, dtype=torch.float32):
    """Matrices of rfft and irfft."""
    forward = constants.fft_matrix(height, "ortho", device=CPU), constants.rfft_matrix(width, "ortho", device=CPU)
    back = constants.ifft_matrix(height, "ortho", device=CPU), constants.irfft_matrix(width, "ortho", device=CPU)
    return [m.to(wide(dtype)) for m in forward], [m.to(wide(dtype)) for m in back]


def assert_accurate(operator, *arguments):
    """At most twice the error of the reference in the same dtype, both against the reference in float64."""

    def exact(argument):
        return argument.double() if isinstance(argument, torch.Tensor) else argument

    results = []
    with uninitialized_memory_is_nan():
        results.append(operator(*arguments))
    results.append(REFERENCE[operator](*arguments))
    results.append(REFERENCE[operator](*map(exact, arguments)))
    results = [(r,) if isinstance(r, torch.Tensor) else r for r in results]
    for actual, baseline, truth in zip(*results, strict=True):
        assert actual.dtype == baseline.dtype
        assert actual.is_contiguous()
        if actual.dtype == torch.float64:  # the baseline is the truth itself
            assert_close(actual, truth)
        else:
            assert_as_accurate(actual, baseline, truth)


def nearly_cosine(n):
    """A DCT matrix whose symmetry ends in one entry."""
    matrix = constants.dct_matrix(n, 2, "ortho", device=CPU)
    matrix[-1, -1] *= 1.0001
    return matrix


MATRICES = {
    **{f"dct {k}": (lambda n, kind=k: constants.dct_matrix(n, kind, "forward", device=CPU)) for k in (2, 3, 4)},
    "dct 1": lambda n: constants.dct_matrix(max(n, 2), 1, "ortho", device=CPU)[:n, :n],
    "rfft": lambda n: constants.rfft_matrix(n, "backward", device=CPU),
    "dense": lambda n: random(n, n, dtype=torch.float64, seed=n),
    "enlarged": lambda n: constants.resize_matrix(n, n + 5, True, device=CPU),
    "reduced": lambda n: constants.resize_matrix(n, (n + 1) // 2, False, device=CPU),
    "nearly a cosine": nearly_cosine,
    "zero": lambda n: torch.zeros(3, n, dtype=torch.float64),
    "two blocks": lambda n: torch.block_diag(*(random(n // 2 + i, n // 2 + i, seed=i).double() for i in (0, n % 2))),
}


@pytest.mark.parametrize("transpose", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("kind", MATRICES)
def test_every_length_and_symmetry_along_the_token_axis(kind, transpose):
    for n in LENGTHS if n_is_cheap(kind) else LENGTHS[:-4]:
        matrix = MATRICES[kind](n).float()
        matrix = matrix.t() if transpose else matrix
        tokens = matrix.shape[1]
        if tokens:
            assert_accurate(SEPARABLE, random(2, tokens, 19, seed=n), None, matrix, 1, tokens, 0)


def n_is_cheap(kind):
    return kind in ("dct 2", "dct 3", "dense")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("height", COMPILED)
def test_compiled_lengths_along_both_axes(height, dtype):
    for kind in ("dct 2", "dct 3", "nearly a cosine", "dct 4"):
        matrix_h, matrix_w = (MATRICES[kind](n).to(wide(dtype)) for n in (height, 14))
        x = random(2, 1 + height * 14, 83, dtype=dtype)
        assert_accurate(SEPARABLE, x, matrix_h, matrix_w, height, 14, 1)


@pytest.mark.parametrize("channels", [1, 3, 15, 16, 17, 48, 63, 64, 83, 130, 192])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_channels(channels, dtype):
    (matrix_h, matrix_w), (inverse_h, inverse_w) = fourier(5, 6, dtype)
    x = random(2, 32, channels, dtype=dtype)
    spectrum = reference.analysis(x, matrix_h, matrix_w, 5, 6, 2)
    assert_accurate(SEPARABLE, x, matrix_h[0], matrix_w, 5, 6, 2)
    assert_accurate(ANALYSIS, x, matrix_h, matrix_w, 5, 6, 2)
    assert_accurate(SYNTHESIS, *spectrum, inverse_h, inverse_w, 2)


@pytest.mark.parametrize("grid", [(n, n) for n in COMPILED] + [(1, 7), (9, 1), (2, 3), (8, 14), (13, 10), (33, 5)])
def test_fourier_maps_and_their_adjoints(grid):
    height, width = grid
    (columns, matrix_w), (inverse_h, inverse_w) = fourier(height, width)
    x = random(2, height * width, 35)
    for matrix_h in (columns, None):
        assert_accurate(ANALYSIS, x, matrix_h, matrix_w, height, width, 0)
        spectrum = reference.analysis(x, matrix_h, matrix_w, height, width, 0)
        adjoint = reference.adjoint(matrix_h)
        assert_accurate(SYNTHESIS, *spectrum, None if matrix_h is None else inverse_h, inverse_w, 0)
        assert_accurate(SYNTHESIS, *spectrum, adjoint, matrix_w.t(), 0)
        assert_accurate(ANALYSIS, x, adjoint, inverse_w.t(), height, width, 0)


def test_rectangular_complex_matrices():
    x = random(2, 20, 9)
    assert_accurate(ANALYSIS, x, random(2, 7, 4, seed=1), random(6, 5, seed=2), 4, 5, 0)
    real, imaginary = random(2, 4, 3, 9), random(2, 4, 3, 9, seed=1)
    assert_accurate(SYNTHESIS, real, imaginary, random(2, 7, 4, seed=1), random(5, 6, seed=2), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_lengths_with_a_spectrum_in_two_parts(dtype):
    for n in (n for n in COMPILED if n % 2 == 0):
        cosine = MATRICES["dct 2"](n).float()
        for matrix in (cosine, cosine.t()):
            assert_accurate(ANALYSIS, random(2, 3 * n, 19, dtype=dtype), None, matrix, 3, n, 0)
            real, imaginary = random(2, 3, n // 2, 19, dtype=dtype), random(2, 3, n // 2, 19, dtype=dtype, seed=1)
            assert_accurate(SYNTHESIS, real, imaginary, None, matrix, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_too_large_for_the_caches(dtype):
    """They leave past the caches where rows are whole cache lines: 96 channels in either dtype, 80 in float32."""
    for channels in (80, 96):
        x = random(2**22 // (112 * channels * dtype.itemsize) + 1, 197, channels, dtype=dtype)
        (matrix_h, matrix_w), (inverse_h, inverse_w) = fourier(14, 14)
        cosine = MATRICES["dct 2"](14).float()
        assert_accurate(SEPARABLE, x, cosine, cosine, 14, 14, 1)
        assert_accurate(ANALYSIS, x, matrix_h, matrix_w, 14, 14, 1)
        spectrum = reference.analysis(x, matrix_h, matrix_w, 14, 14, 1)
        assert_accurate(SYNTHESIS, *spectrum, inverse_h, inverse_w, 1)


def strided(x):
    """The same values as every second token and, over channels, with unit stride."""
    parts = torch.stack((x, torch.full_like(x, float("nan"))), -2)
    return parts[..., 0, :]


@pytest.mark.parametrize("layout", [permuted, strided])
def test_any_strides(layout):
    (matrix_h, matrix_w), (inverse_h, inverse_w) = fourier(3, 4)
    x = random(2, 13, 18)
    real, imaginary = reference.analysis(x, matrix_h, matrix_w, 3, 4, 1)
    cosine = MATRICES["dct 2"](4).float()
    assert_identical(SEPARABLE(layout(x), None, permuted(cosine), 3, 4, 1), SEPARABLE(x, None, cosine, 3, 4, 1))
    for actual, expected in zip(
        ANALYSIS(layout(x), permuted(matrix_h), permuted(matrix_w), 3, 4, 1),
        ANALYSIS(x, matrix_h, matrix_w, 3, 4, 1),
        strict=True,
    ):
        assert_identical(actual, expected)
    expected = SYNTHESIS(real, imaginary, inverse_h, inverse_w, 1)
    assert_identical(SYNTHESIS(layout(real), layout(imaginary), permuted(inverse_h), inverse_w, 1), expected)
    assert_identical(SYNTHESIS(layout(real), imaginary, inverse_h, permuted(inverse_w), 1), expected)


def test_prefix_tokens_are_copied_bit_by_bit_or_zero():
    x = random(2, 14, 21)
    x[:, 0] = float("nan")
    cosine = MATRICES["dct 2"](4).float()
    y = SEPARABLE(x, cosine[:3, :3], cosine, 3, 4, 2)
    assert_identical(y[:, :2], x[:, :2])
    assert y[:, 2:].isfinite().all()
    (matrix_h, matrix_w), (inverse_h, inverse_w) = fourier(3, 4)
    spectrum = ANALYSIS(x, matrix_h, matrix_w, 3, 4, 2)
    assert spectrum[0].isfinite().all()
    assert (SYNTHESIS(*spectrum, inverse_h, inverse_w, 2)[:, :2] == 0).all()


@pytest.mark.skipif(LOADED["cpu"] != "ok", reason="needs the compiled CPU part: the reference checks less")
def test_a_direct_call_cannot_read_outside_its_tensors():
    x, matrix = random(2, 12, 5), random(4, 4)
    for call in (
        lambda: SEPARABLE(x, None, matrix, 3, 5, 0),
        lambda: SEPARABLE(x, matrix, matrix, 3, 4, 0),
        lambda: SEPARABLE(x, None, matrix.double(), 3, 4, 0),
        lambda: ANALYSIS(x, None, random(5, 4), 3, 4, 0),
        lambda: ANALYSIS(x, random(3, 3), matrix, 3, 4, 0),
        lambda: SYNTHESIS(random(2, 3, 2, 5), random(2, 3, 3, 5), None, matrix, 0),
        lambda: SYNTHESIS(random(2, 3, 2, 5), random(2, 3, 2, 5), None, random(4, 3), 0),
    ):
        with pytest.raises(RuntimeError):
            call()


@pytest.mark.parametrize("capability", instruction_sets.smaller())
def test_every_instruction_set(capability):
    """The kernels are chosen once per process, so the tests above run again in another."""
    environment = {**os.environ, "MLIP_KERNELS_CPU_CAPABILITY": capability}
    chosen = "compiled_lengths and float32 or any_number_of_channels and 83 or too_large and float32"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, permuted])
def test_kernels_leave_arguments_alone_and_return_memory_of_their_own(layout):
    def check(operator, arguments):
        torch.library.opcheck(operator, arguments, test_utils="test_schema")

    (matrix_h, matrix_w), (inverse_h, inverse_w) = fourier(3, 4)
    x = layout(random(2, 13, 5))
    real, imaginary = (layout(random(2, 3, 3, 5, seed=seed)) for seed in (1, 2))
    cosine = MATRICES["dct 2"](4).float()
    check(SEPARABLE, (x, random(2, 3), cosine.t(), 3, 4, 1))
    check(SEPARABLE, (x, None, cosine, 3, 4, 1))
    check(ANALYSIS, (x, matrix_h, matrix_w, 3, 4, 1))
    check(ANALYSIS, (x, None, matrix_w, 3, 4, 1))
    check(SYNTHESIS, (real, imaginary, inverse_h, inverse_w, 1))
    check(SYNTHESIS, (real, imaginary, None, matrix_w.t(), 0))
