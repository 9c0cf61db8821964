"""weighted_mean on GPUs, emulated and real: accuracy, gradients, layouts and hard input of both backends."""

import pytest
import torch

from mlip_kernels import use_reference, weighted_mean
from mlip_kernels.testing import DTYPES, TOKEN_SHAPES, assert_as_accurate, assert_close, assert_identical, permuted

HALF_AND_SINGLE = tuple(dtype for dtype in DTYPES if dtype != torch.float64)
ROWS_OF_VECTORS = ((2, 33, 136),)  # rows of a multiple of 16 bytes in every dtype, more than one block of channels
SPLIT_SHAPES = ((2, 530, 33), (1, 1025, 8))  # tokens enough to be cut into parts
KERNELS = {
    "forward": ["weighted_mean_sums_forward_kernel"],
    "split forward": ["weighted_mean_sums_forward_kernel", "weighted_mean_finish_forward_kernel"],
    "backward": ["weighted_mean_backward_kernel"],
    "backward of the weight": ["weighted_mean_products_backward_kernel", "weighted_mean_centre_backward_kernel"],
}
SHIFTED = {
    "contiguous": lambda x: x,
    "permuted": permuted,
    "behind other tokens": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "one element off": lambda x: torch.cat([x[..., :1], x, x[..., :2]], -1)[..., 1:-2],
    "sixteen bytes off": lambda x: torch.cat([x[..., :8], x, x[..., :8]], -1)[..., 8:-8],
}


def tokens(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(shape, kind="fractions", seed=1):
    generator = torch.Generator().manual_seed(seed)
    if kind == "none":
        return None
    if kind == "fractions":
        return torch.rand(shape[:2], generator=generator)
    return torch.randint(0, 3, shape[:2], generator=generator).float()


def mean_and_gradients(x, weight, prefix_tokens=0, put=torch.Tensor.detach):
    """The mean and the gradients of what is given, for a fixed cotangent, on whatever device ``put`` names."""
    leaves = [put(tensor.detach()).requires_grad_() for tensor in (x, weight) if tensor is not None]
    cotangent = tokens((x.shape[0], x.shape[2]), seed=2).to(x.dtype)
    mean = weighted_mean(*leaves, prefix_tokens=prefix_tokens)
    return [mean.detach(), *torch.autograd.grad(mean, leaves, put(cotangent))]


def on(cuda, x, weight, prefix_tokens=0):
    with cuda:
        results = mean_and_gradients(x, weight, prefix_tokens, cuda.put)
    return [result.cpu() for result in results]


def assert_right(results, x, weight, prefix_tokens=0):
    with use_reference():
        baseline = mean_and_gradients(x, weight, prefix_tokens)
        truth = mean_and_gradients(x.double(), None if weight is None else weight.double(), prefix_tokens)
    for name, *three in zip(("mean", "dx", "dw"), results, baseline, truth, strict=False):
        assert_as_accurate(*three, name=f"{name}, {prefix_tokens} prefix tokens")


@pytest.mark.parametrize("kind", ["none", "sizes", "fractions"])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", TOKEN_SHAPES + ROWS_OF_VECTORS + SPLIT_SHAPES, ids=str)
def test_results_and_gradients_are_as_accurate_as_pytorch(cuda, shape, dtype, kind):
    x, weight = tokens(shape, dtype), weights(shape, kind)
    for prefix_tokens in (0, 1) if shape[1] > 2 else (0,):  # of a single token, dw is rounding and nothing else
        assert_right(on(cuda, x, weight, prefix_tokens), x, weight, prefix_tokens)
    assert cuda.operators


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("layout", SHIFTED)
def test_layouts_do_not_matter(cuda, layout, dtype):
    shape = (3, 9, 40)
    x, weight = tokens(shape, dtype), weights(shape)
    expected = on(cuda, x, weight, 1)
    shifted = SHIFTED[layout](x)
    assert shifted.is_contiguous() == (layout == "contiguous")
    assert_right(on(cuda, shifted, permuted(weight), 1), x, weight, 1)
    if layout in ("contiguous", "behind other tokens", "sixteen bytes off"):  # the same kernels
        for found, wanted in zip(on(cuda, shifted, weight, 1), expected, strict=True):
            assert_identical(found, wanted)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_what_has_no_weight_may_hold_anything(cuda, dtype):
    shape = (3, 40, 24)
    x, weight = tokens(shape, dtype), weights(shape)
    weight[:, 5:9] = 0
    weight[1] = 0  # a row without any weight
    clean = x.masked_fill((weight == 0)[..., None], 0)
    garbage = x.masked_fill((weight == 0)[..., None], float("nan"))
    garbage[:, :2], clean[:, :2] = float("inf"), 0  # the prefix
    results = on(cuda, garbage, weight, 2)
    for found, wanted in zip(results, on(cuda, clean, weight, 2), strict=True):
        assert_identical(found, wanted)
    assert not any(result[1].any() for result in results)


@pytest.mark.parametrize(
    ("shape", "forward"), [((2, 33, 8), "forward"), (SPLIT_SHAPES[0], "split forward"), ((0, 33, 8), None)], ids=str
)
def test_each_pass_launches_its_kernels(emulated_cuda, shape, forward):
    passes = {
        "none": [forward, "backward"],
        "fractions": [forward, "backward", "backward of the weight"],
    }
    names = {name for names in KERNELS.values() for name in names}
    for kind, expected in passes.items():
        before = len(emulated_cuda.launches)
        on(emulated_cuda, tokens(shape), weights(shape, kind))
        launched = [name for launch in emulated_cuda.launches[before:] for name in names if name in launch.kernel]
        assert launched == ([name for one in expected for name in KERNELS[one]] if forward else [])


def test_float64_is_left_to_the_reference(cuda):
    x, weight = tokens((2, 9, 5), torch.float64), weights((2, 9, 5)).double()
    with use_reference():
        expected = mean_and_gradients(x, weight, 1)
    for found, wanted in zip(on(cuda, x, weight, 1), expected, strict=True):
        assert_close(found, wanted)
    assert not cuda.operators


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(3, 9, 40), (2, 530, 33)], ids=str)
def test_no_order_of_the_warps_changes_a_bit(scheduled_cuda, shape, dtype):
    x, weight = tokens(shape, dtype), weights(shape, "sizes")
    expected = on(scheduled_cuda.under("round_robin"), x, weight, 1)
    for found, wanted in zip(on(scheduled_cuda, x, weight, 1), expected, strict=True):
        assert_identical(found, wanted)
    assert scheduled_cuda.operators
