"""Results written into memory that the caller gives: `out` of the spectral operators."""

import pytest
import torch

from mlip_kernels import spectral
from mlip_kernels.spectral import constants
from mlip_kernels.testing import assert_identical, permuted


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


X = random(2, 13, 6)
SPECTRUM = random(2, 3, 3, 6, seed=1)
FOURIER, COSINE = random(3, 3, 6, 2, seed=2), random(13, 6, seed=3)
GRID = {"grid": (3, 4), "prefix_tokens": 1}

# Name -> operator of its first input and `out`.
OPERATORS = {
    "dct": (X, lambda x, **out: spectral.dct(x, **GRID, **out)),
    "filter": (X, lambda x, **out: spectral.spectral_filter(x, FOURIER, **GRID, **out)),
    "irfft": (SPECTRUM, lambda x, **out: spectral.irfft(x, x.flip(1), grid=(3, 4), **out)),
    "rfft": (X, lambda x, **out: spectral.rfft(x, **GRID, **out)),
}


def parts(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def test_out_may_be_the_weight():
    weight = COSINE.clone()[None]
    expected = spectral.spectral_filter(X[:1], weight[0], basis="dct")
    assert_identical(spectral.spectral_filter(X[:1], weight[0], basis="dct", out=weight), expected)


def test_a_weight_that_widens_the_tokens_is_computed_and_copied():
    expected = spectral.spectral_filter(X, FOURIER.double(), **GRID)
    out = torch.empty_like(X)
    assert spectral.spectral_filter(X, FOURIER.double(), **GRID, out=out) is out
    assert_identical(out, expected)


def test_without_compiled_kernels_it_is_computed_and_copied(uncompiled):
    code = """
import torch, mlip_kernels as mk
x = torch.randn(2, 12, 6)
out = torch.empty(2, 12, 6)
assert mk.dct(x, out=out) is out
assert torch.equal(out, mk.dct(x))
parts = torch.empty(2, 3, 3, 6), torch.empty(2, 3, 3, 6)
assert mk.rfft(x, grid=(3, 4), out=parts) is not None
assert all(map(torch.equal, parts, mk.rfft(x, grid=(3, 4))))
"""
    done = uncompiled.run("-c", code, MLIP_KERNELS_DISABLE_EXT="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("x", "operator"), OPERATORS.values(), ids=OPERATORS.keys())
def test_compiles_as_one_graph(x, operator):
    torch._dynamo.reset()
    expected = operator(x)
    out = tuple(map(torch.empty_like, parts(expected)))

    def call(x, out):
        operator(2 * x, out=out[0] if len(out) == 1 else out)
        operator(x, out=out[0] if len(out) == 1 else out)
        return out[0] + 1

    above = torch.compile(call, fullgraph=True, backend="aot_eager")(x, out)
    for part, one in zip(out, parts(expected), strict=True):
        assert_identical(part, one)
    assert_identical(above, parts(expected)[0] + 1)


def test_autograd_notices_that_what_it_saved_was_overwritten():
    buffer, scale = X.clone(), torch.ones(6, requires_grad=True)
    loss = (buffer * scale).sum()
    spectral.dct(X, out=buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode():
    with torch.inference_mode():
        out = torch.empty_like(X)
        assert spectral.dct(X, out=out) is out
        assert_identical(out, spectral.dct(X))


SHARED = torch.empty(5, 7, 6)
BAD_OUTPUT = [
    ("out", TypeError, lambda: spectral.dct(X, out=X.numpy())),
    ("out", TypeError, lambda: spectral.dct(X, out=X.double())),
    ("out", ValueError, lambda: spectral.idct(X, out=torch.empty(2, 12, 6))),
    ("out", ValueError, lambda: spectral.idct(X, out=torch.empty(0))),
    ("out", ValueError, lambda: spectral.dct(X, out=X.to("meta"))),
    ("out", ValueError, lambda: spectral.dct(X, out=torch.empty(1, 13, 6).expand(2, 13, 6))),
    ("out", ValueError, lambda: spectral.spectral_filter(X, COSINE, basis="dct", out=X[:1])),
    ("out", ValueError, lambda: spectral.spectral_resize(X, (1, 13), (2, 3), out=torch.empty_like(X))),
    ("out", ValueError, lambda: spectral.irfft(X, X, n=25, out=torch.empty_like(X))),
    ("out", TypeError, lambda: spectral.rfft(X, out=torch.empty(2, 7, 6))),
    ("out", TypeError, lambda: spectral.rfft(X, out=[torch.empty(2, 7, 6)])),
    ("out[1]", ValueError, lambda: spectral.rfft(X, out=(torch.empty(2, 7, 6), X))),
    ("out", ValueError, lambda: spectral.rfft(X, out=[torch.empty(2, 7, 6)] * 2)),
    ("out", ValueError, lambda: spectral.rfft(X, out=(SHARED[:2], SHARED[1:3]))),
    ("out", ValueError, lambda: spectral.rfft(X, out=(SHARED[:2], SHARED.as_strided((2, 7, 6), (84, 6, 1), 42)))),
    ("out", ValueError, lambda: spectral.dct(X, out=torch.empty(200).as_strided((2, 13, 6), (1, 6, 1)))),
    ("out", ValueError, lambda: spectral.dct(X, out=torch.empty(200).as_strided((2, 13, 6), (70, 5, 1)))),
    ("out", ValueError, lambda: spectral.dct(X, out=torch.zeros_like(X)._neg_view())),
]


@pytest.mark.parametrize(("argument", "error", "call"), BAD_OUTPUT)
def test_bad_output_is_named(argument, error, call):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(f"{argument}: ")


def test_the_two_parts_of_a_complex_tensor_do_not_share_memory():
    spectrum = torch.empty(2, 7, 6, dtype=torch.complex64)
    spectral.rfft(X, out=(spectrum.real, spectrum.imag))
    assert_identical(spectrum.real, spectral.rfft(X)[0])
    assert_identical(spectrum.imag, spectral.rfft(X)[1])


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, permuted])
def test_operators_pass_the_checks_of_torch(layout):
    cpu = torch.device("cpu")
    cosine = constants.dct_matrix(4, 2, "ortho", device=cpu).float()
    rows, columns = constants.rfft_matrix(4, "ortho", device=cpu).float(), random(2, 3, 3)
    x, real, weight = layout(X), layout(SPECTRUM), layout(FOURIER)
    spectrum = [layout(torch.empty(2, 3, 3, 6)) for _ in range(2)]
    operators = torch.ops.mlip_kernels
    hermitian = constants.fft_matrix(3, "ortho", device=cpu).float()
    for operator, arguments in (
        (operators.spectral_separable_out, (x, None, layout(cosine), 3, 4, 1, torch.empty_like(x))),
        (operators.spectral_analysis_out, (x, layout(columns), rows, 3, 4, 1, *spectrum)),
        (operators.spectral_synthesis_out, (real, real.flip(1), columns, layout(rows.t()), 1, torch.empty_like(x))),
        (operators.spectral_filtered_out, (x, weight, hermitian, layout(rows), 3, 4, 1, torch.empty_like(x))),
    ):
        torch.library.opcheck(operator.default, arguments)
