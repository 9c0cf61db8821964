"""Spectral operators in graphs and transforms, and arguments that do not go together: what tests/promises leaves."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from mlip_kernels import spectral, use_reference
from mlip_kernels.spectral import constants
from mlip_kernels.testing import assert_close, assert_identical, gradients

X = torch.randn(2, 13, 6, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(3, 3, 6, 2, generator=torch.Generator().manual_seed(1))
COSINE_WEIGHT = torch.randn(12, 6, generator=torch.Generator().manual_seed(2))

BAD_INPUT = [  # what does not go together; each argument alone: tests/robustness/test_error_table.py
    ("type", ValueError, lambda: spectral.dct(X[:, :1], type=1)),
    ("type", ValueError, lambda: spectral.idct(X, type=1, grid=(1, 13))),
    ("type", ValueError, lambda: spectral.dct(X, type=1, prefix_tokens=12)),
    ("dim", ValueError, lambda: spectral.idct(X, dim=2, grid=(1, 13))),
    ("norm", ValueError, lambda: spectral.irfft(X, X, n=25, norm="backwards")),
    ("grid", ValueError, lambda: spectral.rfft(X, grid=(1, 13), prefix_tokens=1)),
    ("real", ValueError, lambda: spectral.irfft(X, X, n=13)),
    ("real", ValueError, lambda: spectral.irfft(X, X, grid=(13, 1))),
    ("imag", TypeError, lambda: spectral.irfft(X, None, n=25)),
    ("n", ValueError, lambda: spectral.irfft(X[:, :1], X[:, :1])),
    ("n", ValueError, lambda: spectral.irfft(WEIGHT, WEIGHT, n=12, grid=(3, 4))),
    ("weight", ValueError, lambda: spectral.spectral_filter(X, WEIGHT, prefix_tokens=1, grid=(4, 3))),
    ("weight", ValueError, lambda: spectral.spectral_filter(X, WEIGHT, prefix_tokens=1)),
    ("weight", ValueError, lambda: spectral.spectral_filter(X, COSINE_WEIGHT, basis="dct")),
    ("bands", ValueError, lambda: spectral.band_energy(X, torch.zeros(13, dtype=torch.long), basis="rfft")),
    ("bands", ValueError, lambda: spectral.band_energy(X, torch.zeros(13, dtype=torch.long), grid=(1, 13))),
    ("bands", ValueError, lambda: spectral.band_energy(X, torch.full((13,), -1))),
]


@pytest.mark.parametrize(("argument", "error", "call"), BAD_INPUT)
def test_bad_input_is_named(argument, error, call):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(f"{argument}: ")


FIXED = {
    "dct": lambda x: spectral.dct(x, grid=(3, 4), prefix_tokens=1),
    "spectral_filter": lambda x: spectral.spectral_filter(x, WEIGHT, grid=(3, 4), prefix_tokens=1),
    "band_energy": lambda x: spectral.band_energy(x, 3, grid=(3, 4), prefix_tokens=1),
}


@pytest.mark.parametrize("operator", FIXED.values(), ids=FIXED.keys())
def test_compiles_as_one_graph_with_fixed_shapes(operator):
    """Which calls kernels and neither computes matrices nor multiplies by them."""
    torch._dynamo.reset()
    called = set()

    def record(graph, _):
        called.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record)
    compiled = torch.compile(operator, fullgraph=True, backend=backend, dynamic=False)
    assert_close(gradients(compiled, [X])[0], gradients(operator, [X])[0])
    assert any(name.startswith("mlip_kernels.") for name in called)
    assert not called & {"aten.cos.default", "aten.arange.default", "aten.mm.default", "aten.bmm.default"}


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


def test_meta_tensors_have_shapes():
    assert spectral.dct(X.to("meta")).shape == X.shape
    assert spectral.token_energy(X.to("meta"), 0.5).shape == X.shape[:2]


def test_export_with_a_free_number_of_tokens():
    class Transform(torch.nn.Module):
        def forward(self, x):
            return spectral.dct(x)

    exported = torch.export.export(Transform(), (X,), dynamic_shapes={"x": {1: torch.export.Dim("tokens", min=2)}})
    for n in (13, 7):
        assert_close(exported.module()(X[:, :n]), spectral.dct(X[:, :n]))


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
