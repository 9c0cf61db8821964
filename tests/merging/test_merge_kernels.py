"""The operators behind merge plans: exactly the reference, on every instruction set, in every tracer."""

import os
import subprocess
import sys

import instruction_sets
import pytest
import torch

from mlip_kernels import merge_plan, merge_tokens, use_reference
from mlip_kernels._library import LOADED
from mlip_kernels.merging import plain as reference
from mlip_kernels.testing import (
    DTYPES,
    assert_close,
    assert_identical,
    gradients,
    permuted,
    uninitialized_memory_is_nan,
)

OPERATORS = torch.ops.mlip_kernels
KINDS = ("random", "similar", "few values", "scaled", "copies")


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def metrics(kind, *shape, dtype=torch.float32):
    """Tokens whose cosines are far apart, or closer than sums in float32 can tell, or often equal.

    Of "copies", every source has one target that is far better than the others, and all sources tie.
    """
    x = random(*shape, dtype=torch.float64)
    if kind == "similar":
        x = 1 + 1e-3 * x
    elif kind == "few values":
        x = x.sign() * (x.abs() > 0.5)
    elif kind == "scaled":
        # Lengths at both ends of the range, where their inverses are beyond it.
        ends = {torch.float16: (1e3, 1e-6), torch.float64: (1e300, 1e-310)}.get(dtype, (1e37, 1e-40))
        x = x * torch.tensor([1.0, *ends], dtype=torch.float64).repeat(shape[1])[: shape[1], None]
    elif kind == "copies":
        sources = x[:, 2::2]
        sources.copy_(x.to(dtype)[:, 1::2][:, : sources.shape[1]])
        sources *= 2.0 ** torch.arange(-1, 2).repeat(shape[1])[: sources.shape[1], None]
    return x.to(dtype)


def masks(batch, tokens, keep=0.7):
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(9)) < keep


def assert_same_plan(found, expected):
    for name in ("assignment", "kept", "removed", "mask", "dropped"):
        one, two = getattr(found, name), getattr(expected, name)
        assert (one is None) == (two is None)
        if two is not None:
            assert_identical(one.cpu(), two, name=name)


# Tails behind every vector; a batch whose sources are one task; targets in more than one panel; a single sample.
@pytest.mark.parametrize("shape", [(3, 21, 2), (9, 130, 1), (2, 300, 900), (1, 401, 33), (8, 65, 64)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plans_are_those_of_the_reference_to_the_last_tie(shape, kind, dtype):
    batch, tokens, _ = shape
    metric, guide, mask = metrics(kind, *shape, dtype=dtype), random(batch, tokens, seed=1), masks(batch, tokens)
    for options in ({}, {"mask": mask, "guide": guide, "guide_weight": 0.3, "prefix_tokens": 2}):
        found = merge_plan(metric, tokens // 4, **options)
        with use_reference():
            assert_same_plan(found, merge_plan(metric, tokens // 4, **options))


# Channels that are whole vectors and a batch past the size at which results bypass the caches, and neither.
@pytest.mark.parametrize("shape", [(4, 50, 33), (1, 300, 64), (11, 197, 512), (0, 9, 8), (2, 12, 0)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_gradients_are_those_of_the_reference_bit_for_bit(shape, masked, dtype):
    batch, tokens, channels = shape
    mask = masks(batch, tokens) if masked else None
    plan = merge_plan(random(batch, tokens, 4), tokens // 3, mask=mask)
    matching = plan._matching()
    x, y = random(*shape, dtype=dtype), random(batch, plan.merged_tokens, channels, dtype=dtype, seed=1)
    size = torch.randint(0, 9, (batch, tokens), generator=torch.Generator().manual_seed(2)).float()
    for prepare in (lambda t: t, permuted):
        with uninitialized_memory_is_nan():
            merged, merged_size = plan.merge(prepare(x), prepare(size))
            (grad_x,) = gradients(lambda t: plan.merge(t, size)[0], [prepare(x)])
            (grad_y,) = gradients(plan.unmerge, [prepare(y)])
            spread = plan.unmerge(prepare(y))
        for one, two in zip((merged, merged_size), reference.merge(x, size, matching), strict=True):
            assert_identical(one, two)
        assert_identical(spread, reference.unmerge(y, matching))
        weight = reference.merged_sizes(size, matching, reference.accumulation_dtype(dtype))[1]
        (grad,) = gradients(lambda t: t, [merged])
        assert_identical(grad_x, reference.spread(grad, weight, matching))
        (grad,) = gradients(lambda t: t, [x])
        assert_identical(grad_y, reference.combine(grad, None, matching))


def test_padding_may_hold_anything_in_every_direction():
    x, mask = random(3, 60, 33), masks(3, 60)
    plan = merge_plan(x, 20, mask=mask)
    assert plan.dropped.any()
    poisoned = x.masked_fill(~mask[..., None], torch.nan)
    assert_identical(plan.merge(poisoned)[0][plan.mask], plan.merge(x)[0][plan.mask])
    y = random(3, 40, 33)
    (grad,) = torch.autograd.grad(
        plan.unmerge(y.requires_grad_()), y, poisoned.masked_fill(~plan.dropped[..., None], 1)
    )
    assert grad.isfinite().all()


def test_it_compiles_into_one_graph_with_gradients_for_any_shape():
    def loss(x, metric, mask=None):
        merged, size, plan = merge_tokens(x, metric, x.shape[1] // 4, mask=mask)
        return (merged * size[..., None]).square().sum() + plan.unmerge(merged).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 13, 8), (3, 16, 4), (4, 22, 12)):
        for mask in (None, masks(*shape[:2])):
            inputs = [random(*shape), random(*shape, seed=1)] + ([] if mask is None else [mask])
            for found, expected in zip(gradients(compiled, inputs), gradients(loss, inputs), strict=True):
                assert_close(found, expected)


def test_it_exports_as_one_node_per_operator():
    class Merge(torch.nn.Module):
        def forward(self, x):
            merged, size, plan = merge_tokens(x, x, 4)
            return plan.unmerge(merged), size

    x = random(3, 17, 8)
    program = torch.export.export(Merge(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    for name in ("match", "merge", "spread"):
        assert names.count(f"mlip_kernels.merging_{name}.default") == 1
    for one, two in zip(program.module()(x[:2]), Merge()(x[:2]), strict=True):
        assert_identical(one, two)


needs_kernels = pytest.mark.skipif(LOADED["cpu"] != "ok", reason="needs the compiled CPU part: pip install .")


@needs_kernels
@pytest.mark.parametrize(("r", "prefix"), [(0, 1), (5, 1), (1, -1), (1, 10)])
def test_a_direct_call_that_would_leave_its_tensors_raises(r, prefix):
    with pytest.raises(RuntimeError, match="expected 1 <= r"):
        OPERATORS.merging_match(random(2, 10, 3), r, None, 1.0, prefix, None)


@pytest.mark.parametrize("capability", instruction_sets.smaller())
def test_smaller_instruction_sets_give_what_the_reference_gives(capability):
    """Some of the comparisons above, in a process that uses no more than this."""
    tests = "(plans_are_those and 900) or (rows_and_gradients and 33)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", tests, "-p", "no:cacheprovider"]
    environment = {**os.environ, "MLIP_KERNELS_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
