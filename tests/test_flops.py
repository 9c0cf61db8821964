"""The FLOPs that FlopCounterMode reports: for every operator, forward and backward, by the formulas of the design."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mlip_kernels as mk
from mlip_kernels import _flops

B, H, W, D, P = 2, 3, 4, 5, 1
N = H * W
K = W // 2 + 1
ROWS, COLUMNS = 2 * B * D * H * W * W, 2 * B * D * W * H * H
COSINE = ROWS + COLUMNS
FOURIER = 2 * B * D * H * W * 2 * K + 8 * B * D * K * H * H
LINE = 2 * B * D * N * N
FOURIER_LINE = 2 * B * D * N * 2 * (N // 2 + 1)

X = torch.randn(B, P + N, D, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.ones(H, K, D, 2)
ON_GRID = {"grid": (H, W), "prefix_tokens": P}
M, C = 7, 3
TEXTS = torch.randn(C, M, D, generator=torch.Generator().manual_seed(1))
LOGITS = torch.randn(B, B, generator=torch.Generator().manual_seed(2))
ALL = P + N
R = 2

LINEAR = {
    "dct": (lambda x: mk.dct(x, **ON_GRID), COSINE, COSINE),
    "dct over tokens": (lambda x: mk.dct(x, prefix_tokens=P), LINE, LINE),
    "dct over channels": (lambda x: mk.dct(x, dim=2), 2 * B * ALL * D * D, 2 * B * ALL * D * D),
    "rfft": (lambda x: mk.rfft(x, **ON_GRID), FOURIER, FOURIER),
    "rfft over tokens": (lambda x: mk.rfft(x, prefix_tokens=P), FOURIER_LINE, FOURIER_LINE),
    "irfft": (lambda x: mk.irfft(x[:, :7], x[:, 6:], n=N), FOURIER_LINE, FOURIER_LINE),
    "filter": (lambda x: mk.spectral_filter(x, WEIGHT, **ON_GRID), 2 * FOURIER, 2 * FOURIER),
    "resize": (
        lambda x: mk.spectral_resize(x, (H, W), (2, 6), prefix_tokens=P),
        2 * B * D * (H * W * 6 + 6 * H * 2),
        2 * B * D * (2 * 6 * W + W * 2 * H),
    ),
}
OTHERS = {
    "filter with a weight to learn": (
        lambda x: mk.spectral_filter(x, WEIGHT.clone().requires_grad_(), **ON_GRID),
        2 * FOURIER,
        2 * FOURIER + 2 * FOURIER + 8 * B * H * K * D,
    ),
    "cosine filter with a weight to learn": (
        lambda x: mk.spectral_filter(x, torch.ones(N, D, requires_grad=True), basis="dct", prefix_tokens=P),
        2 * LINE,
        2 * LINE + 2 * LINE + 2 * B * N * D,
    ),
    "band_energy": (lambda x: mk.band_energy(x, 3, **ON_GRID), COSINE + 2 * B * N * D, 2 * COSINE),
    "Fourier band_energy": (
        lambda x: mk.band_energy(x, 3, basis="rfft", **ON_GRID),
        FOURIER + 4 * B * H * K * D,
        2 * FOURIER,
    ),
    "token_energy": (lambda x: mk.token_energy(x, 0.5, **ON_GRID), 2 * COSINE + 2 * B * N * D, 4 * COSINE),
    "Fourier token_energy": (
        lambda x: mk.token_energy(x, 0.5, basis="rfft", **ON_GRID),
        2 * FOURIER + 2 * B * N * D,
        4 * FOURIER,
    ),
    "amplitude_phase": (lambda x: mk.amplitude_phase(x, **ON_GRID), FOURIER, 2 * FOURIER),
    "merge": (lambda x: mk.merge_tokens(x, x, R)[0], 2 * B * 6 * 6 * D + 2 * B * ALL * D, B * ALL * D),
    "merge, few into one": (
        lambda x: mk.merge_tokens(x, x, R, max_merges=1)[0],
        2 * B * 6 * 6 * D + 2 * B * ALL * D,
        B * ALL * D,
    ),
    "unmerge": (lambda x: mk.merge_plan(X, R).unmerge(x[:, R:]), 2 * B * 6 * 6 * D, B * R * D),
    "weighted_mean": (lambda x: mk.weighted_mean(x, prefix_tokens=P), B * N * D, B * N * D),
    "weighted_mean with weights to learn": (
        lambda x: mk.weighted_mean(x, torch.ones(B, ALL, requires_grad=True)),
        2 * B * ALL * D,
        B * ALL * D + 2 * B * ALL * D,
    ),
    "token_logits": (
        lambda x: mk.token_logits(x, TEXTS.clone().requires_grad_()),
        2 * B * C * (ALL * M * D + ALL + M),
        4 * B * C * (ALL + M) * D,
    ),
    "pair_cross_entropy": (lambda x: mk.pair_cross_entropy(LOGITS + 0 * x.sum()), 6 * B * B, 7 * B * B),
    "pair_cross_entropy of rows": (
        lambda x: mk.pair_cross_entropy(LOGITS + 0 * x.sum(), directions="rows"),
        3 * B * B,
        3 * B * B,
    ),
}


def count(call):
    """FLOPs of a call on tokens that need a gradient, and of the backward pass of what it returns."""
    x = X.clone().requires_grad_()
    with FlopCounterMode(display=False) as forward:
        results = call(x)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize(("call", "forward", "backward"), [*LINEAR.values(), *OTHERS.values()], ids=[*LINEAR, *OTHERS])
def test_flops_are_those_of_the_design(call, forward, backward):
    assert count(call) == (forward, backward)


@pytest.mark.parametrize(
    "name", [name for name in LINEAR if name != "resize"]
)  # autograd goes back W first, we H first
def test_transforms_count_what_pytorch_counts_for_their_definition(name):
    call = LINEAR[name][0]
    with mk.use_reference():
        plain = count(call)
    assert count(call) == plain


def test_writing_into_a_given_tensor_counts_the_same():
    out = torch.empty_like(X)
    with FlopCounterMode(display=False) as counter:
        mk.dct(X, **ON_GRID, out=out)
    assert counter.get_total_flops() == COSINE


KERNELS_OF_OPERATORS = {
    *(f"spectral_{name}" for name in ("separable", "analysis", "synthesis", "filtered", "band_energy", "token_energy")),
    *(f"spectral_{name}_out" for name in ("separable", "analysis", "synthesis", "filtered")),
    *(f"spectral_{name}" for name in ("filtered_backward_weight", "band_energy_backward", "token_energy_backward")),
    *("contrastive_token_maxima", "contrastive_token_maxima_backward", "contrastive_pair_cross_entropy"),
}
"""They run inside of an operator, which is what a counter sees."""


def test_every_operator_that_computes_on_tensors_has_a_formula():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mlip_kernels::")]
    schemas = [getattr(torch.ops.mlip_kernels, name.partition("::")[2]).default._schema for name in names]
    computing = [schema for schema in schemas if any("Tensor" in str(given.type) for given in schema.arguments)]
    found = {schema.name.partition("::")[2] for schema in computing}
    assert found - KERNELS_OF_OPERATORS == set(_flops.FORMULAS)
    assert found >= KERNELS_OF_OPERATORS


def test_counting_costs_nothing_before_it_is_imported():
    code = (
        "import sys, mlip_kernels as mk, torch\n"
        f"assert {_flops.COUNTER!r} not in sys.modules\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as counter: mk.dct(torch.ones(1, 4, 1))\n"
        "print(counter.get_total_flops())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.stdout == "32\n", shown.stderr
