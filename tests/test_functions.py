"""``mlip_kernels.functions``: each operator as a ``torch.autograd.Function``, the same as its public function."""

import pytest
import torch

import mlip_kernels as mk
from mlip_kernels import functions
from mlip_kernels.testing import assert_identical


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, TEXTS, LOGITS = random(2, 17, 6), random(3, 5, 6, seed=1), random(6, 6, seed=2)
SPECTRUM = random(2, 9, 6, seed=3), random(2, 9, 6, seed=4)
FILTER, WEIGHT = random(4, 3, 6, 2, seed=5), random(2, 17, seed=6).abs()
SCALE, BIAS = torch.tensor(2.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
PLAN = mk.merge_plan(X, 3)
GRID = {"grid": (4, 4), "prefix_tokens": 1}

# Class -> arguments of ``apply``, which of them are differentiated, and the public function of these.
CASES = {
    "DCT": ((X, 2, (4, 4), "ortho", 1), (0,), lambda x: mk.dct(x, **GRID)),
    "InverseDCT": ((X, 3, None, "backward"), (0,), lambda x: mk.idct(x, type=3, norm="backward")),
    "RFFT": ((X, (4, 4), "ortho", 1), (0,), lambda x: mk.rfft(x, **GRID)),
    "InverseRFFT": ((*SPECTRUM, 17), (0, 1), lambda real, imag: mk.irfft(real, imag, n=17)),
    "SpectralFilter": (
        (X, FILTER, (4, 4), "rfft", "ortho", 1),
        (0, 1),
        lambda x, weight: mk.spectral_filter(x, weight, **GRID),
    ),
    "BandEnergy": ((X, 3, (4, 4), "rfft", 1), (0,), lambda x: mk.band_energy(x, 3, basis="rfft", **GRID)),
    "TokenEnergy": ((X, 0.3, (4, 4), "dct", 1), (0,), lambda x: mk.token_energy(x, 0.3, **GRID)),
    "AmplitudePhase": ((X, (4, 4), 1e-6, 1), (0,), lambda x: mk.amplitude_phase(x, **GRID)),
    "SpectralResize": (
        (X, (4, 4), (2, 3), True, 1),
        (0,),
        lambda x: mk.spectral_resize(x, (4, 4), (2, 3), prefix_tokens=1),
    ),
    "MergeTokens": ((X, WEIGHT, *PLAN.maps), (0,), lambda x: PLAN.merge(x, WEIGHT)),
    "UnmergeTokens": ((X[:, :14], *PLAN.maps), (0,), PLAN.unmerge),
    "WeightedMean": ((X, WEIGHT, 1), (0, 1), lambda x, weight: mk.weighted_mean(x, weight, prefix_tokens=1)),
    "TokenLogits": (
        (X, TEXTS, None, None, WEIGHT, None, SCALE, BIAS),
        (0, 1, 4, 6, 7),
        lambda images, texts, weight, scale, bias: mk.token_logits(
            images, texts, image_weight=weight, scale=scale, bias=bias
        ),
    ),
    "PairCrossEntropy": ((LOGITS, None, "both", 0.1), (0,), lambda x: mk.pair_cross_entropy(x, label_smoothing=0.1)),
}
ONCE = {"BandEnergy", "TokenEnergy", "WeightedMean", "TokenLogits", "PairCrossEntropy"}
"""Those whose second derivative is refused."""

every_function = pytest.mark.parametrize("name", CASES)


def applied(name):
    """``apply`` as a function of what is differentiated, and these."""
    arguments, positions, _ = CASES[name]
    function = getattr(functions, name)

    def call(*leaves):
        given = list(arguments)
        for position, leaf in zip(positions, leaves, strict=True):
            given[position] = leaf
        return function.apply(*given)

    return call, [arguments[position].clone().requires_grad_() for position in positions]


def results_and_gradients(call, leaves):
    results = call(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    differentiable = [result for result in results if result.requires_grad]
    ones = [torch.ones_like(result) for result in differentiable]
    return *results, *torch.autograd.grad(differentiable, leaves, ones)


def all_identical(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert_identical(one, other)


def test_every_operator_is_an_autograd_function():
    assert set(functions.__all__) == {*CASES, "MatchTokens"}
    for name in functions.__all__:
        assert issubclass(getattr(functions, name), torch.autograd.Function)


@every_function
def test_apply_is_the_public_function(name):
    call, leaves = applied(name)
    all_identical(results_and_gradients(call, leaves), results_and_gradients(CASES[name][2], leaves))
    with mk.use_reference():
        all_identical(results_and_gradients(call, leaves), results_and_gradients(CASES[name][2], leaves))


def test_matching_is_that_of_the_plan():
    for mask in (None, WEIGHT > 0.5):
        plan = mk.merge_plan(X, 3, guide=WEIGHT, mask=mask)
        maps = functions.MatchTokens.apply(X, 3, WEIGHT, 1.0, 1, mask)
        for actual, expected in zip(maps, plan.maps, strict=True):
            assert_identical(actual, torch.empty(2, 0, dtype=torch.bool) if expected is None else expected)


@every_function
def test_gradients_are_those_of_differences(name):
    call, leaves = applied(name)

    def differentiable(*given):
        results = call(*given)
        return tuple(r for r in results if r.requires_grad) if isinstance(results, tuple) else results

    assert torch.autograd.gradcheck(differentiable, leaves)
    if name not in ONCE:
        assert torch.autograd.gradgradcheck(differentiable, leaves)
        return
    results = call(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    gradients = torch.autograd.grad([r.sum() for r in results], leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(sum(g.sum() for g in gradients), leaves)


@every_function
def test_apply_compiles_as_one_graph(name):
    torch._dynamo.reset()
    call, leaves = applied(name)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    all_identical(results_and_gradients(compiled, leaves), results_and_gradients(call, leaves))


@every_function
def test_a_public_function_is_one_node(name):
    torch._dynamo.reset()
    _, leaves = applied(name)
    public, nodes = CASES[name][2], []

    def record(graph, _):
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compile(public, fullgraph=True, backend=record)(*leaves)

    class Module(torch.nn.Module):
        def forward(self, *given):
            return public(*given)

    exported = torch.export.export(Module(), tuple(leaf.detach() for leaf in leaves))
    nodes_of_export = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    for found in (nodes, nodes_of_export):
        ours = [node for node in found if "getitem" not in node and not node.startswith("aten.")]
        assert len(ours) == 1
        assert ours[0].startswith("mlip_kernels.")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("DCT", (X, 5), "^type: "),
        ("RFFT", (X, (3, 5)), "^grid: "),
        ("SpectralFilter", (X, FILTER), "^weight: "),
        ("BandEnergy", (X, 0), "^bands: "),
        ("MergeTokens", (X[:, 1:], None, *PLAN.maps), "^x: "),
        ("UnmergeTokens", (X, *PLAN.maps), "^y: "),
        ("WeightedMean", (X, WEIGHT[:, 1:]), "^weight: "),
        ("TokenLogits", (X, TEXTS, WEIGHT), "^image_mask: "),
        ("PairCrossEntropy", (X[0],), "^logits: "),
        ("MatchTokens", (X, -1), "^r: "),
    ],
)
def test_apply_names_a_wrong_argument(name, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(functions, name).apply(*arguments)


def test_arguments_that_are_left_out_have_the_public_defaults():
    assert_identical(functions.DCT.apply(X), mk.dct(X))
    assert_identical(functions.WeightedMean.apply(X), mk.weighted_mean(X))
    all_identical(functions.TokenLogits.apply(X, TEXTS), mk.token_logits(X, TEXTS))
    torch._dynamo.reset()
    compiled = torch.compile(functions.TokenLogits.apply, fullgraph=True, backend="aot_eager")
    leaf = X.clone().requires_grad_()
    all_identical(
        results_and_gradients(lambda x: compiled(x, TEXTS), [leaf]),
        results_and_gradients(lambda x: mk.token_logits(x, TEXTS), [leaf]),
    )
