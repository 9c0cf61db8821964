"""Attention that counts a merged token as often as its size."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlip_kernels.merging import proportional_attention
from mlip_kernels.merging.attention import attend_by_channels
from mlip_kernels.testing import assert_as_accurate, assert_close, assert_identical, gradients


def inputs(dtype=torch.float32, batch=3, heads=2, queries=7, keys=7, width=8, values=8, largest=9):
    generator = torch.Generator().manual_seed(queries + keys)
    q = torch.randn(batch, heads, queries, width, generator=generator)
    k = torch.randn(batch, heads, keys, width, generator=generator)
    v = torch.randn(batch, heads, keys, values, generator=generator)
    size = torch.randint(1, largest + 1, (batch, keys), generator=generator).float()
    return (*(t.to(dtype) for t in (q, k, v)), size)


def formula(q, k, v, size, scale=None):
    """The definition, in the dtype of the inputs."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores + size.to(q.dtype).log()[:, None, None, :]).softmax(-1) @ v


def repeated(q, k, v, size):
    """Plain attention over the sequence in which every key stands as often as its size says."""
    samples = [torch.arange(k.shape[2]).repeat_interleave(counts.long()) for counts in size]
    pairs = enumerate(samples)
    return torch.cat(
        [F.scaled_dot_product_attention(q[b : b + 1], k[b : b + 1, :, n], v[b : b + 1, :, n]) for b, n in pairs]
    )


SHAPES = ({}, {"queries": 3, "keys": 50}, {"values": 5}, {"width": 1, "values": 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_the_formula_in_values_and_gradients(dtype, shape):
    q, k, v, size = inputs(dtype, **shape)
    exact = [t.double() for t in (q, k, v)]
    assert_as_accurate(proportional_attention(q, k, v, size), formula(q, k, v, size), formula(*exact, size))
    mine = gradients(lambda *t: proportional_attention(*t, size), (q, k, v))
    plain = gradients(lambda *t: formula(*t, size), (q, k, v))
    truth = gradients(lambda *t: formula(*t, size), exact)
    for one, two, three, name in zip(mine, plain, truth, "qkv", strict=True):
        assert_as_accurate(one, two, three, name=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formula_in_float64(shape):
    q, k, v, size = inputs(torch.float64, **shape)
    assert_close(proportional_attention(q, k, v, size), formula(q, k, v, size))
    mine = gradients(lambda *t: proportional_attention(*t, size), (q, k, v))
    truth = gradients(lambda *t: formula(*t, size), (q, k, v))
    for one, two, name in zip(mine, truth, "qkv", strict=True):
        assert_close(one, two, name=name)


def test_a_single_key_gets_all_attention_whatever_its_size():
    q, k, v, size = inputs(keys=1)
    assert_close(proportional_attention(q, k, v, size), v.expand(q.shape), roundings=2)


def test_equals_attention_over_the_repeated_sequence():
    q, k, v, size = inputs(torch.float64)
    assert_close(proportional_attention(q, k, v, size), repeated(q, k, v, size))
    assert proportional_attention(q, k, v, size).isfinite().all()


def test_sizes_of_one_and_no_sizes_are_plain_attention():
    q, k, v, size = inputs()
    plain = F.scaled_dot_product_attention(q, k, v)
    assert_close(proportional_attention(q, k, v, torch.ones_like(size)), plain, roundings=2)
    assert_identical(proportional_attention(q, k, v, None), plain)
    assert_close(proportional_attention(q, k, v, size, scale=0.3), formula(*(t.double() for t in (q, k, v)), size, 0.3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_counts_beyond_float16_stay_exact_in_half_precision(dtype, autocast):
    q, k, v, _ = inputs(dtype)
    size = torch.tensor([1.0, 3.0, 65_504.0, 65_521.0, 100_000.0, 1e6, 7.0]).expand(3, -1)
    truth = formula(q.double(), k.double(), v.double(), size)
    # Values for which only the rounding of q, k, v and of the output counts, not that of log size.
    baseline = formula(q.float(), k.float(), v.float(), size).to(dtype)
    if autocast:
        with torch.autocast("cpu", dtype):
            found = proportional_attention(q.float(), k.float(), v.float(), size)
    else:
        found = proportional_attention(q, k, v, size)
    assert found.dtype == dtype
    assert_as_accurate(found, baseline, truth)


COUNTS = torch.tensor([1.0, 3.0, 65_504.0, 0.0, 100_000.0, 1e6, 7.0]).expand(3, -1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.02, 3.0])
@pytest.mark.parametrize("shape", [{}, {"queries": 33, "width": 12, "values": 12}])
def test_log_size_as_channels_is_as_exact_as_a_float32_mask(dtype, scale, shape):
    """What GPUs compute in half precision, on the CPU; the same product in one channel would err ten times as much."""
    q, k, v, _ = inputs(dtype, **shape)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def channels(q, k, v):
        return attend_by_channels(q, k, v, COUNTS.log(), scale=scale)

    def masked(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=COUNTS.log()[:, None, None], scale=scale)

    exact = [t.double() for t in (q, k, v)]
    assert_as_accurate(channels(q, k, v), masked(q, k, v), formula(*exact, COUNTS, scale))
    mine, plain = gradients(channels, (q, k, v)), gradients(masked, (q, k, v))
    truth = gradients(lambda *t: formula(*t, COUNTS, scale), exact)
    for one, two, three, name in zip(mine, plain, truth, "qkv", strict=True):
        assert_as_accurate(one, two, three, name=name)
    assert_identical(mine[1][:, :, 3], torch.zeros_like(mine[1][:, :, 3]))


@pytest.mark.parametrize(
    ("dtype", "width", "channels"),
    [(torch.bfloat16, 64, 72), (torch.float16, 80, 88), (torch.float16, 256, None), (torch.float32, 64, None)],
)
def test_fused_attention_of_gpus_gets_a_mask_only_where_it_takes_one_exactly(monkeypatch, dtype, width, channels):
    calls = []

    def attention(q, k, v, **arguments):
        calls.append((q.shape[-1], k.shape[-1], v.shape[-1], arguments.get("attn_mask")))
        return v.new_empty(*q.shape[:-1], v.shape[-1])

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    with FakeTensorMode():
        q = torch.empty(2, 3, 5, width, dtype=dtype, device="cuda")
        found = proportional_attention(q, q, q, torch.ones(2, 5, device="cuda"))
    assert (found.shape, found.dtype) == (q.shape, dtype)
    ((*widths, mask),) = calls
    if channels is None:
        assert widths == [width] * 3
        assert (mask.shape, mask.dtype) == ((2, 1, 1, 5), dtype)
    else:
        assert widths == [channels] * 3
        assert mask is None


def test_without_padding_nothing_else_changes():
    q, k, v, size = inputs()
    expected = proportional_attention(q, k, v, size)
    assert_identical(proportional_attention(q, k, v, size, padding=False), expected)
    size[:, 2] = 0
    assert_identical(proportional_attention(q, k, v, size, padding=False), proportional_attention(q, k, v, size))


def test_autocast_gives_mixed_inputs_one_dtype_and_leaves_float64_alone():
    q, k, v, size = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = proportional_attention(q, k.bfloat16(), v, size)
        double = proportional_attention(q.double(), k.double(), v.double(), size)
        assert torch.is_autocast_enabled("cpu")
    assert_identical(mixed, proportional_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), size))
    assert_identical(double, proportional_attention(q.double(), k.double(), v.double(), size))


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_size_zero_gets_no_attention_and_a_sample_without_keys_gives_zeros(backend):
    q, k, v, size = inputs()
    size[0, 2:4] = 0
    size[1] = 0
    with sdpa_kernel(backend):
        found = proportional_attention(q, k, v, size)
        grads = gradients(lambda *t: proportional_attention(*t, size), (q, k, v))
    keep = [0, 1, 4, 5, 6]
    truth = formula(q.double(), k[:, :, keep].double(), v[:, :, keep].double(), size[:, keep])
    assert_close(found[0], truth[0])
    assert_close(found[2], formula(q.double(), k.double(), v.double(), size)[2])
    assert_identical(found[1], torch.zeros_like(found[1]))
    for grad in grads:
        assert grad.isfinite().all()
        assert_identical(grad[1], torch.zeros_like(grad[1]))
    for grad in grads[1:]:
        assert_identical(grad[0, :, 2:4], torch.zeros_like(grad[0, :, 2:4]))


def test_dropout_drops():
    q, k, v, size = inputs(torch.bfloat16)
    torch.manual_seed(0)
    assert not torch.equal(proportional_attention(q, k, v, size, dropout_p=0.5), proportional_attention(q, k, v, size))
    assert_identical(proportional_attention(q, k, v, size, dropout_p=1.0), torch.zeros_like(q))


def test_compiles_as_one_graph_also_under_autocast():
    q, k, v, size = inputs()
    compiled = torch.compile(proportional_attention, fullgraph=True, backend="aot_eager")
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert_identical(compiled(q, k, v, size), proportional_attention(q, k, v, size))


@pytest.mark.parametrize("size", [[[1.0] * 17, [2.0] * 17], [[1.0] * 17, [0.0] * 17], None])
def test_attention_has_the_strides_of_that_of_torch_whatever_the_sizes(size):
    """As it comes from a projection to q, k and v, so that heads can be joined by a view."""
    q, k, v = torch.randn(2, 17, 3, 4, 8).permute(2, 0, 3, 1, 4)
    size = None if size is None else torch.tensor(size)
    expected = F.scaled_dot_product_attention(q, k, v)
    assert proportional_attention(q, k, v, size).stride() == expected.stride()
    padded = proportional_attention(q, k, v, size, padding=False)
    assert padded.stride() == expected.stride()
