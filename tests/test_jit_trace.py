"""``torch.jit.trace`` of every operator, without anything remembered, and with arguments computed from sizes."""

import contextlib
import warnings

import pytest
import torch

import mlip_kernels as mk
from mlip_kernels.spectral import constants
from mlip_kernels.testing import assert_identical


def _tokens(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _joined(results):
    return torch.cat([result.flatten() for result in results])


OPERATORS = {
    "dct": lambda x: mk.dct(x, grid=(x.shape[1] // 5, 5)),
    "idct": lambda x: mk.idct(x, type=3, prefix_tokens=x.shape[1] // 6),
    "dct over channels": lambda x: mk.dct(x, dim=2),
    "rfft": lambda x: _joined(mk.rfft(x)),
    "irfft": lambda x: mk.irfft(x, x, n=2 * x.shape[1] - 1),
    "spectral_filter": lambda x: mk.spectral_filter(x, torch.ones(5, 3, 3, 2), grid=(5, x.shape[1] // 5)),
    "band_energy": lambda x: mk.band_energy(x, x.shape[1] // 6),
    "token_energy": lambda x: mk.token_energy(x, 0.5, grid=(x.shape[1] // 5, 5)),
    "amplitude_phase": lambda x: _joined(mk.amplitude_phase(x)),
    "spectral_resize": lambda x: mk.spectral_resize(x, (x.shape[1] // 5, 5), (3, x.shape[1] // 5)),
    "merge_plan": lambda x: mk.merge_plan(x, x.shape[1] // 4).assignment,
    "merge_tokens": lambda x: mk.merge_tokens(x, x, x.shape[1] // 4, prefix_tokens=x.shape[1] // 12)[0],
    "merge_tokens, few into one": lambda x: mk.merge_tokens(x, x, 6, max_merges=x.shape[1] // 12)[0],
    "weighted_mean": lambda x: mk.weighted_mean(x, prefix_tokens=x.shape[1] // 5),
    "proportional_attention": lambda x: mk.proportional_attention(x[:, None], x[:, None], x[:, None], None),
    "token_logits": lambda x: _joined(mk.token_logits(x, x)),
    "pair_cross_entropy": lambda x: mk.pair_cross_entropy(x[:, : x.shape[0], 0]),
}


@pytest.mark.parametrize("definition", [contextlib.nullcontext, mk.use_reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
def test_a_cold_trace_computes_what_the_operator_computes(operator, definition):
    constants._remembered.cache_clear()
    with definition(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is deprecated, and that sizes become constants
        traced = torch.jit.trace(operator, _tokens(2, 25, 3))
        other = _tokens(2, 25, 3, seed=1)
        assert_identical(traced(other), operator(other))


def test_a_trace_holds_matrices_instead_of_building_them():
    constants._remembered.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(OPERATORS["dct"], _tokens(2, 25, 3))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "mlip_kernels::dct" in kinds
    assert not kinds & {"aten::cos", "aten::arange"}


def test_traces_leave_no_sizes_in_what_is_remembered():
    """A size is a tensor while tracing; as a key it would equal nothing, and each trace would remember its own."""
    constants._remembered.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            torch.jit.trace(lambda x: mk.dct(x), _tokens(1, 13, 2))
    assert constants._remembered.cache_info().entries == 1


def test_outside_of_a_trace_a_tensor_of_more_than_one_number_is_no_integer():
    with pytest.raises(TypeError, match=r"^r: "):
        mk.merge_plan(_tokens(1, 8, 2), torch.tensor([1, 2]))
