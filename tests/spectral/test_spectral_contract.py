"""What every spectral operator promises: bad input, autocast, inference mode, compilation, function transforms."""

import io

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from mlip_kernels import spectral, use_reference
from mlip_kernels.spectral import constants
from mlip_kernels.testing import assert_close, assert_identical, gradients, threads

X = torch.randn(2, 13, 6, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(3, 3, 6, 2, generator=torch.Generator().manual_seed(1))
COSINE_WEIGHT = torch.randn(12, 6, generator=torch.Generator().manual_seed(2))

OPERATORS = {
    "dct": lambda x: spectral.dct(x, grid=(3, 4), prefix_tokens=1),
    "idct": lambda x: spectral.idct(x, type=4, norm="forward", prefix_tokens=1),
    "rfft": lambda x: spectral.rfft(x, grid=(3, 4), prefix_tokens=1),
    "irfft": lambda x: spectral.irfft(x[:, :7], x[:, 6:], n=13),
    "spectral_filter": lambda x: spectral.spectral_filter(x, WEIGHT, grid=(3, 4), prefix_tokens=1),
    "spectral_filter dct": lambda x: spectral.spectral_filter(x, COSINE_WEIGHT, basis="dct", prefix_tokens=1),
    "band_energy": lambda x: spectral.band_energy(x, 3, grid=(3, 4), prefix_tokens=1),
    "token_energy": lambda x: spectral.token_energy(x, 0.4, basis="rfft", prefix_tokens=1),
    "amplitude_phase": lambda x: spectral.amplitude_phase(x, grid=(3, 4), prefix_tokens=1),
    "spectral_resize": lambda x: spectral.spectral_resize(x, (3, 4), (2, 5), prefix_tokens=1),
}

every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())


def joined(operator):
    """One tensor per call, so that operators with two results compare like the others."""

    def call(x):
        result = operator(x)
        return result if isinstance(result, torch.Tensor) else torch.cat(result)

    return call


BAD_INPUT = [
    ("x", TypeError, lambda: spectral.dct([1.0])),
    ("x", TypeError, lambda: spectral.rfft(X.long())),
    ("x", ValueError, lambda: spectral.idct(X[0])),
    ("x", ValueError, lambda: spectral.dct(X[:, :0])),
    ("x", ValueError, lambda: spectral.amplitude_phase(X[..., :0])),
    ("type", ValueError, lambda: spectral.dct(X, type=5)),
    ("type", TypeError, lambda: spectral.dct(X, type=2.0)),
    ("type", ValueError, lambda: spectral.dct(X[:, :1], type=1)),
    ("type", ValueError, lambda: spectral.idct(X, type=1, grid=(1, 13))),
    ("type", ValueError, lambda: spectral.dct(X, type=1, prefix_tokens=12)),
    ("dim", ValueError, lambda: spectral.dct(X, dim=0)),
    ("dim", ValueError, lambda: spectral.dct(X, dim=3)),
    ("dim", ValueError, lambda: spectral.idct(X, dim=2, grid=(1, 13))),
    ("norm", ValueError, lambda: spectral.dct(X, norm="orthogonal")),
    ("norm", ValueError, lambda: spectral.irfft(X, X, n=25, norm="backwards")),
    ("grid", ValueError, lambda: spectral.dct(X, grid=(3, 4))),
    ("grid", ValueError, lambda: spectral.rfft(X, grid=(1, 13), prefix_tokens=1)),
    ("grid", TypeError, lambda: spectral.band_energy(X, 3, grid=13)),
    ("grid", TypeError, lambda: spectral.spectral_resize(X, None, (2, 2))),
    ("grid[0]", ValueError, lambda: spectral.token_energy(X, 0.5, grid=(0, 13))),
    ("grid[1]", TypeError, lambda: spectral.irfft(X, X, grid=(1, 2.0))),
    ("prefix_tokens", ValueError, lambda: spectral.dct(X, prefix_tokens=13)),
    ("prefix_tokens", ValueError, lambda: spectral.rfft(X, prefix_tokens=-1)),
    ("prefix_tokens", TypeError, lambda: spectral.token_energy(X, 0.5, prefix_tokens=True)),
    ("real", ValueError, lambda: spectral.irfft(X, X, n=13)),
    ("real", ValueError, lambda: spectral.irfft(X, X, grid=(13, 1))),
    ("real", ValueError, lambda: spectral.irfft(X[..., :0], X[..., :0])),
    ("imag", ValueError, lambda: spectral.irfft(X, X[:1], n=25)),
    ("imag", TypeError, lambda: spectral.irfft(X, X.double(), n=25)),
    ("imag", TypeError, lambda: spectral.irfft(X, None, n=25)),
    ("imag", ValueError, lambda: spectral.irfft(X, X.to("meta"), n=25)),
    ("n", ValueError, lambda: spectral.irfft(X, X, n=0)),
    ("n", ValueError, lambda: spectral.irfft(X[:, :1], X[:, :1])),
    ("n", ValueError, lambda: spectral.irfft(WEIGHT, WEIGHT, n=12, grid=(3, 4))),
    ("weight", TypeError, lambda: spectral.spectral_filter(X, WEIGHT.tolist(), prefix_tokens=1, grid=(3, 4))),
    ("weight", TypeError, lambda: spectral.spectral_filter(X, WEIGHT + 0j, prefix_tokens=1, grid=(3, 4))),
    ("weight", ValueError, lambda: spectral.spectral_filter(X, WEIGHT, prefix_tokens=1, grid=(4, 3))),
    ("weight", ValueError, lambda: spectral.spectral_filter(X, WEIGHT, prefix_tokens=1)),
    ("weight", ValueError, lambda: spectral.spectral_filter(X, COSINE_WEIGHT, basis="dct")),
    ("weight", ValueError, lambda: spectral.spectral_filter(X, WEIGHT.to("meta"), prefix_tokens=1, grid=(3, 4))),
    ("basis", ValueError, lambda: spectral.spectral_filter(X, WEIGHT, basis="fft")),
    ("basis", ValueError, lambda: spectral.band_energy(X, 3, basis="wavelet")),
    ("basis", ValueError, lambda: spectral.token_energy(X, 0.5, basis=None)),
    ("bands", ValueError, lambda: spectral.band_energy(X, 0)),
    ("bands", TypeError, lambda: spectral.band_energy(X, 2.5)),
    ("bands", ValueError, lambda: spectral.band_energy(X, 2**30)),
    ("bands", TypeError, lambda: spectral.band_energy(X, torch.zeros(13))),
    ("bands", ValueError, lambda: spectral.band_energy(X, torch.zeros(13, dtype=torch.long), basis="rfft")),
    ("bands", ValueError, lambda: spectral.band_energy(X, torch.zeros(13, dtype=torch.long), grid=(1, 13))),
    ("bands", ValueError, lambda: spectral.band_energy(X, torch.full((13,), -1))),
    ("cutoff", ValueError, lambda: spectral.token_energy(X, -0.1)),
    ("cutoff", ValueError, lambda: spectral.token_energy(X, 1.5)),
    ("cutoff", ValueError, lambda: spectral.token_energy(X, float("nan"))),
    ("cutoff", TypeError, lambda: spectral.token_energy(X, "high")),
    ("eps", ValueError, lambda: spectral.amplitude_phase(X, eps=-1e-6)),
    ("eps", ValueError, lambda: spectral.amplitude_phase(X, eps=float("inf"))),
    ("new_grid", TypeError, lambda: spectral.spectral_resize(X, (1, 13), 4)),
    ("new_grid[1]", ValueError, lambda: spectral.spectral_resize(X, (1, 13), (4, 0))),
    ("rescale", TypeError, lambda: spectral.spectral_resize(X, (1, 13), (1, 4), rescale=2.0)),
]


@pytest.mark.parametrize(("argument", "error", "call"), BAD_INPUT)
def test_bad_input_is_named(argument, error, call):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(f"{argument}: ")


@every_operator
def test_autocast_changes_nothing(operator):
    operator = joined(operator)
    leaf = X.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = operator(leaf)
        (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    plain = X.clone().requires_grad_()
    expected = operator(plain)
    assert_identical(y, expected)
    assert_identical(gradient, torch.autograd.grad(expected, plain, torch.ones_like(expected))[0])


@every_operator
def test_training_works_after_inference_mode(operator):
    constants._remembered.cache_clear()
    operator = joined(operator)
    with torch.inference_mode():
        expected = operator(X).clone()
    leaf = X.clone().requires_grad_()
    y = operator(leaf)
    y.square().sum().backward()
    assert_identical(y, expected)
    assert leaf.grad.isfinite().all()


@every_operator
def test_fake_tensors_and_function_transforms_leave_nothing_behind(operator):
    constants._remembered.cache_clear()
    operator = joined(operator)
    with FakeTensorMode(allow_non_fake_inputs=True):
        shape = operator(torch.empty(2, 13, 6)).shape
    derivative = torch.func.grad(lambda x: operator(x).sum())(X)
    mapped = torch.func.vmap(operator)(torch.stack((X, 2 * X)))
    y = operator(X)
    assert type(y) is torch.Tensor
    assert y.shape == shape
    assert_close(mapped[0], y)
    assert_close(mapped[1], operator(2 * X))
    leaf = X.clone().requires_grad_()
    assert_close(derivative, torch.autograd.grad(operator(leaf).sum(), leaf)[0])


def assert_compiles(operator, dynamic):
    """As one graph, which calls kernels and neither computes matrices nor multiplies by them."""
    torch._dynamo.reset()
    operator, called = joined(operator), set()

    def record(graph, _):
        called.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record)
    compiled = torch.compile(operator, fullgraph=True, backend=backend, dynamic=dynamic)
    results = []
    for function in (compiled, operator):
        leaf = X.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = function(leaf)
        results.append((y, torch.autograd.grad(y, leaf, torch.ones_like(y))[0]))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)
    assert any(name.startswith("mlip_kernels.") for name in called)
    assert not called & {"aten.cos.default", "aten.arange.default", "aten.mm.default", "aten.bmm.default"}


@every_operator
def test_compiles_as_one_graph_with_free_shapes(operator):
    assert_compiles(operator, dynamic=True)


@pytest.mark.parametrize("name", ["dct", "spectral_filter", "band_energy"])
def test_compiles_as_one_graph_with_fixed_shapes(name):
    assert_compiles(OPERATORS[name], dynamic=False)


def test_a_graph_serves_any_number_of_tokens():
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: spectral.token_energy(spectral.dct(x), 0.4), dynamic=True, backend=backend)
    for n in (13, 20, 7):
        x = X.repeat(1, 2, 1)[:, :n]
        assert_close(compiled(x), spectral.token_energy(spectral.dct(x), 0.4))
    assert backend.frame_count == 1


@pytest.mark.parametrize(
    "transform", [torch.func.vmap, lambda f: lambda x: torch.func.grad(f)(x[0])], ids=["vmap", "grad"]
)
def test_function_transforms_compile_as_one_graph(transform):
    torch._dynamo.reset()
    transformed = transform(lambda x: spectral.dct(x[None], grid=(3, 4), prefix_tokens=1).square().sum())
    assert_close(torch.compile(transformed, fullgraph=True, backend="aot_eager")(X), transformed(X))


def test_the_reference_compiles_and_trains_as_one_graph():
    torch._dynamo.reset()

    def train(x):
        with use_reference():
            return spectral.spectral_filter(x, WEIGHT, grid=(3, 4), prefix_tokens=1)

    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    assert_close(compiled(X), train(X))
    assert_close(gradients(compiled, [X])[0], gradients(train, [X])[0])


@every_operator
def test_forward_and_backward_derivatives_agree(operator):
    operator, x, tangent = joined(operator), X.double(), X.double().flip(1)
    derivative = torch.func.jvp(operator, (x,), (tangent,))[1]
    cotangent = torch.randn(derivative.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(operator(leaf), leaf, cotangent)
    products = torch.stack(((derivative * cotangent).sum(), (gradient * tangent).sum()))
    scale = torch.stack((derivative.norm() * cotangent.norm(), gradient.norm() * tangent.norm()))
    assert_close(torch.cat((products[:1], scale)), torch.cat((products[1:], scale)), roundings=32)
    with forward_ad.dual_level():  # outside of torch.func
        assert_identical(forward_ad.unpack_dual(operator(forward_ad.make_dual(x, tangent))).tangent, derivative)


@every_operator
def test_results_do_not_depend_on_the_number_of_threads(operator):
    operator, x = joined(operator), X.repeat(16, 1, 40)[..., :6].contiguous()
    with threads(1):
        expected = gradients(operator, [x])[0], operator(x)
    with threads(2):
        actual = gradients(operator, [x])[0], operator(x)
    for one, two in zip(expected, actual, strict=True):
        assert_identical(two, one)


@every_operator
def test_input_is_not_modified(operator):
    x = X.clone()
    operator(x)
    assert_identical(x, X)


@every_operator
def test_results_are_contiguous_and_own_their_memory(operator):
    result = operator(X)
    for part in [result] if isinstance(result, torch.Tensor) else result:
        assert part.is_contiguous()
        assert part.untyped_storage().data_ptr() != X.untyped_storage().data_ptr()


def test_meta_tensors_have_shapes():
    assert spectral.dct(X.to("meta")).shape == X.shape
    assert spectral.token_energy(X.to("meta"), 0.5).shape == X.shape[:2]


@every_operator
def test_export(operator):
    class Transform(torch.nn.Module):
        def forward(self, x):
            return joined(operator)(x)

    dynamic = {"x": {0: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(Transform(), (X,), dynamic_shapes=dynamic)
    assert "aten.cos.default" not in {str(node.target) for node in program.graph.nodes}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for x in (X, torch.cat((X, X + 1, X - 1))):
        assert_close(exported(x), Transform()(x))


def test_export_with_a_free_number_of_tokens():
    class Transform(torch.nn.Module):
        def forward(self, x):
            return spectral.dct(x)

    exported = torch.export.export(Transform(), (X,), dynamic_shapes={"x": {1: torch.export.Dim("tokens", min=2)}})
    for n in (13, 7):
        assert_close(exported.module()(X[:, :n]), spectral.dct(X[:, :n]))


@pytest.mark.parametrize("name", ["dct", "rfft", "spectral_filter", "band_energy", "token_energy"])
def test_results_and_gradients_are_the_same_bits_again_and_on_two_threads(name):
    """At a size that is split."""
    weight = torch.randn(14, 8, 256, 2, generator=torch.Generator().manual_seed(3))
    arguments = {"spectral_filter": (weight,), "band_energy": (4,), "token_energy": (0.4,)}.get(name, ())
    x = torch.randn(8, 196, 256, generator=torch.Generator().manual_seed(4))

    def run():
        def call(x, *learned):
            return getattr(spectral, name)(x, *(learned or arguments), grid=(14, 14))

        learned = [a for a in arguments if isinstance(a, torch.Tensor)]
        return [joined(call)(x), *gradients(call, [x, *learned])]

    with threads(1):
        alone = run()
    for count in (1, 2, 2):
        with threads(count):
            for now, before in zip(run(), alone, strict=True):
                assert_identical(now, before)


def test_no_matrix_of_a_function_transform_is_remembered():
    constants._remembered.cache_clear()
    torch.func.grad(lambda x: spectral.dct(x).sum())(X)
    assert constants._remembered.cache_info().entries == 0


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("dct_matrix", (5, 2, "ortho")), ("resize_matrix", (5, 3, True)), ("high_pass", ([3, 4], "dct", 0.5))],
)
def test_graphs_fetch_copies_of_what_is_remembered(name, parameters):
    fetch = getattr(torch.ops.mlip_kernels, f"spectral_{name}").default
    options = {"device": torch.device("cpu"), "dtype": torch.float32}
    first, kept = fetch(*parameters, **options), fetch(*parameters, **options)
    first.zero_()
    assert_identical(fetch(*parameters, **options), kept)
    assert kept.any()
    torch.library.opcheck(fetch, parameters, options)


def test_matrices_are_built_once():
    constants._remembered.cache_clear()
    for _ in range(3):
        spectral.dct(X, grid=(1, 13))
    assert constants._remembered.cache_info().misses == 2
