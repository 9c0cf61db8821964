"""SpectralFilter, FrequencyStage and AttentionPool."""

import pytest
import torch
from torch import nn

from mlip_kernels.nn.pooling import AttentionPool
from mlip_kernels.nn.spectral import FrequencyStage, SpectralFilter, resample_filter
from mlip_kernels.spectral import spectral_filter
from mlip_kernels.testing import assert_close, assert_identical, gradients


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class GlobalFilter(nn.Module):
    """The layer of GFNet as its checkpoints know it: one parameter ``complex_weight`` ``[h, w, D, 2]``."""

    def __init__(self, dim, h, w):
        super().__init__()
        self.complex_weight = nn.Parameter(torch.randn(h, w, dim, 2) * 0.02)

    def forward(self, x, height, width):
        spectrum = torch.fft.rfft2(x.view(-1, height, width, x.shape[2]).float(), dim=(1, 2), norm="ortho")
        spectrum = spectrum * torch.view_as_complex(self.complex_weight)
        return torch.fft.irfft2(spectrum, s=(height, width), dim=(1, 2), norm="ortho").reshape(x.shape)


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (5, 8)])
def test_loads_a_gfnet_state_dict_and_gives_its_output(grid):
    height, width = grid
    theirs, ours = GlobalFilter(6, height, width // 2 + 1).double(), SpectralFilter(6, grid).double()
    ours.load_state_dict(theirs.state_dict())
    x = tokens(2, height * width, 6)
    assert_close(ours(x), theirs(x, height, width).detach())


def test_loads_gfnets_filters_inside_a_model():
    """Under the keys of a GFNet checkpoint: blocks.0.filter.complex_weight, ..."""

    def model(layer):
        return nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"filter": layer()}) for _ in range(2))}).double()

    theirs, ours = model(lambda: GlobalFilter(6, 7, 4)), model(lambda: SpectralFilter(6, (7, 7)))
    assert list(theirs.state_dict()) == [f"blocks.{i}.filter.complex_weight" for i in range(2)]
    ours.load_state_dict(theirs.state_dict())
    x = tokens(2, 49, 6)
    for one, other in zip(ours["blocks"], theirs["blocks"], strict=True):
        assert_close(one["filter"](x), other["filter"](x, 7, 7).detach())


@pytest.mark.parametrize("basis", ["rfft", "dct"])
@pytest.mark.parametrize("grid", [(3, 4), 12])
def test_filter_equals_the_operator(grid, basis):
    module = SpectralFilter(6, grid, basis=basis, prefix_tokens=2)
    (weight,) = module.parameters()
    x = tokens(2, 14, 6)
    pair = grid if isinstance(grid, tuple) else None
    assert_identical(module(x), spectral_filter(x, weight, grid=pair, basis=basis, prefix_tokens=2))
    assert weight.abs().max() < 0.2
    assert weight.abs().max() > 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_filter_keeps_the_dtype_of_its_input(dtype):
    x = tokens(2, 12, 6, dtype=dtype)
    assert SpectralFilter(6, (3, 4))(x).dtype == dtype
    assert SpectralFilter(6, (3, 4)).to(dtype)(x).dtype == dtype


@pytest.mark.parametrize("basis", ["rfft", "dct"])
@pytest.mark.parametrize(
    ("grid", "new_grid"), [((7, 7), (14, 14)), ((14, 14), (7, 5)), ((5, 6), (5, 9)), (49, 100), (9, 4)]
)
def test_resampling_keeps_the_response_per_frequency(grid, new_grid, basis):
    """A response that is linear in the frequency of each axis is met exactly wherever it is interpolated."""

    def response(grid):
        axes = grid if isinstance(grid, tuple) else (grid,)
        result = torch.zeros(*axes, 1)
        for axis, n in enumerate(axes):
            k = torch.arange(n).double()
            shape = [-1 if other == axis else 1 for other in range(len(axes) + 1)]
            result = result + ((axis + 1) * (k if basis == "dct" else torch.minimum(k, n - k)) / n).reshape(shape)
        if basis == "dct":
            return result
        result = result[..., : axes[-1] // 2 + 1, :]
        return torch.stack((result, -3 * result), -1)

    weight, expected = response(grid), response(new_grid)
    actual = resample_filter(weight, grid, new_grid, basis=basis)
    assert actual.shape == expected.shape
    axes, new_axes = ((g if isinstance(g, tuple) else (g,)) for g in (grid, new_grid))
    inside = torch.ones(expected.shape, dtype=torch.bool)
    for axis, (n, new_n) in enumerate(zip(axes, new_axes, strict=True)):
        old = torch.arange(expected.shape[axis]) * n / new_n
        known = old <= weight.shape[axis] - 1
        if basis == "rfft" and axis < len(axes) - 1:
            known = (old - n / 2).abs() >= 0.5 if n % 2 else torch.ones_like(known)
        inside &= known.reshape([-1 if other == axis else 1 for other in range(expected.dim())])
    assert inside.double().mean() > 0.5
    assert_close(actual[inside], expected[inside])


def test_resampling_to_the_same_grid_is_the_identity():
    weight = tokens(7, 4, 3, 2)
    assert resample_filter(weight, (7, 7), (7, 7)) is weight


@pytest.mark.parametrize("basis", ["rfft", "dct"])
@pytest.mark.parametrize(("grid", "new_grid"), [((4, 4), (6, 5)), (16, 30)])
def test_filter_runs_at_another_resolution(grid, new_grid, basis):
    module = SpectralFilter(6, grid, basis=basis)
    x = tokens(2, 30, 6)
    y = module(x, new_grid)
    y.sum().backward()
    assert next(module.parameters()).grad.any()
    module.set_grid(new_grid)
    assert module.grid == new_grid
    assert_close(module(x), y)


BAD_INPUT = [
    ("dim", lambda: SpectralFilter(0, (3, 4))),
    ("grid", lambda: SpectralFilter(6, (3, 4, 5))),
    ("basis", lambda: SpectralFilter(6, (3, 4), basis="fft")),
    ("prefix_tokens", lambda: SpectralFilter(6, (3, 4), prefix_tokens=-1)),
    ("grid", lambda: SpectralFilter(6, (3, 4))(tokens(2, 12, 6), 12)),
    ("x", lambda: SpectralFilter(6, (3, 4))(tokens(2, 12, 5))),
    ("depth", lambda: FrequencyStage(6, (3, 4), 0)),
    ("transform", lambda: FrequencyStage(6, (3, 4), transform="2d")),
    ("mixer", lambda: FrequencyStage(6, (3, 4), mixer="mlp")),
    ("mlp_ratio", lambda: FrequencyStage(6, (3, 4), mlp_ratio=-1.0)),
    ("basis", lambda: FrequencyStage(6, (3, 4), mixer="filter_bank", basis="dct")),
    ("x", lambda: FrequencyStage(6, (3, 4))(tokens(2, 11, 6))),
    ("grid", lambda: FrequencyStage(6, (3, 4), mixer="none")(tokens(2, 30, 6), (5, 6))),
    ("weight", lambda: AttentionPool(6)(tokens(2, 12, 6), tokens(2, 11))),
    ("x", lambda: AttentionPool(5)(tokens(2, 12, 6))),
]


@pytest.mark.parametrize(("argument", "call"), BAD_INPUT)
def test_bad_input_is_named(argument, call):
    with pytest.raises((ValueError, TypeError)) as raised:
        call()
    assert str(raised.value).startswith(f"{argument}: ")


@pytest.mark.parametrize("mixer", ["filter", "filter_bank", "complex_mlp", "none"])
@pytest.mark.parametrize("transform", ["grid", "tokens"])
def test_stage_keeps_shape_and_dtype_and_trains_every_parameter(transform, mixer):
    stage = FrequencyStage(8, (3, 4), transform=transform, mixer=mixer)
    y = stage(tokens(2, 12, 8, dtype=torch.float32))
    y.square().sum().backward()
    assert y.shape == (2, 12, 8)
    assert all(parameter.grad.isfinite().all() for parameter in stage.parameters())
    assert stage.bfloat16()(tokens(2, 12, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("basis", ["rfft", "dct"])
@pytest.mark.parametrize("transform", ["grid", "tokens"])
def test_stage_is_the_written_formula(transform, basis):
    stage = FrequencyStage(8, (3, 4), depth=3, transform=transform, basis=basis, mlp_ratio=2.0)
    assert len(stage.blocks) == 3
    x = expected = tokens(2, 12, 8)
    for block in stage.blocks:
        (weight,) = block.filter.parameters()
        y = nn.functional.layer_norm(expected, (8,), block.norm1.weight, block.norm1.bias, eps=1e-6)
        y = spectral_filter(y, weight, grid=(3, 4) if transform == "grid" else None, basis=basis)
        y = nn.functional.layer_norm(y, (8,), block.norm2.weight, block.norm2.bias, eps=1e-6)
        assert block.mlp.fc1.weight.shape == (16, 8)
        expected = expected + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(y)))
    assert_close(stage(x), expected)


def test_stage_follows_another_grid():
    for transform in ("grid", "tokens"):
        stage = FrequencyStage(8, (3, 4), transform=transform)
        assert stage(tokens(2, 30, 8), (5, 6)).shape == (2, 30, 8)


def test_gradient_checkpointing_changes_no_gradient_and_saves_memory():
    stage = FrequencyStage(8, (3, 4))
    results, saved = [], []
    for stage.gradient_checkpointing in (False, True):
        stage.zero_grad()
        x = tokens(2, 12, 8).requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = stage(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in stage.parameters())])
        saved.append(sum(t.numel() for t in kept))
    for plain, recomputed in zip(*results, strict=True):
        assert_close(recomputed, plain)
    assert saved[1] < saved[0] / 2


def test_pool_is_a_softmax_of_one_query():
    pool, x = AttentionPool(6), tokens(2, 9, 6)
    pool.query.data.normal_()
    attention = (x @ pool.query * 6**-0.5).softmax(-1)
    assert_close(pool(x), torch.einsum("bn,bnd->bd", attention, x))


def test_pool_counts_a_token_of_size_k_k_times():
    pool, x = AttentionPool(6), tokens(1, 4, 6)
    pool.query.data.normal_()
    repeated = x.repeat_interleave(torch.tensor([3, 1, 2, 0]), 1)
    assert_close(pool(x, torch.tensor([[3.0, 1.0, 2.0, 0.0]])), pool(repeated))


def test_pool_of_nothing_is_zero_without_gradient():
    pool, weight = AttentionPool(6), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    x = tokens(2, 2, 6)
    assert not pool(x, weight)[0].any()
    assert_close(pool(x, weight)[1], x[1, 1])
    dx, dweight = gradients(pool, [x, weight])
    assert not dx[0].any()
    assert dx[1, 1].any()
    assert dweight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_pool_computes_in_float32_or_better(dtype):
    pool, x = AttentionPool(6), tokens(2, 9, 6, dtype=dtype)
    wide = x.to(torch.promote_types(dtype, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert_identical(pool(x), pool(wide).to(dtype))
    assert pool(x[:0]).shape == (0, 6)
