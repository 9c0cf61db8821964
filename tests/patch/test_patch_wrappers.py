"""Blocks take and return tensors while tokens merge: hooks, checkpoint wrappers and counters see what they know."""

import copy
import threading
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block, ResPostBlock
from tiny_vit import images, tiny
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.flop_counter import FlopCounterMode

from mlip_kernels.nn.attention import attend
from mlip_kernels.patch import timm as patch
from mlip_kernels.testing import assert_as_accurate, assert_close, assert_identical


def gradients_of(model: nn.Module, x: Tensor | None = None) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    model(images() if x is None else x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def assert_all_identical(ones: list[Tensor], others: list[Tensor]) -> None:
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert_identical(one, other)


def in_wrappers(model: nn.Module, impl: CheckpointImpl) -> nn.Module:
    apply_activation_checkpointing(
        model, lambda block: checkpoint_wrapper(block, checkpoint_impl=impl), lambda module: isinstance(module, Block)
    )
    return model


@pytest.mark.parametrize("change", [{}, {"block_fn": ResPostBlock, "init_values": 0.5}])
def test_hooks_of_blocks_and_their_attention_see_tensors(change: dict[str, Any]):
    model, seen = patch.apply(tiny(**change), [2, 0, 3]), []
    for block in model.blocks:
        for module in (block, block.attn):
            module.register_forward_pre_hook(lambda module, args: seen.append([a.shape[1] for a in args]))
            module.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
            module.register_full_backward_hook(lambda module, grads, outputs: seen.append(grads[0].shape[1]))
    model(images().requires_grad_()).sum().backward()
    forward = [[17], [17], 17, 15, [15], [15], 15, 15, [15], [15], 15, 12]
    assert seen == [*forward, 15, 15, 15, 15, 17, 17]


@pytest.mark.parametrize("place", ["attn", "attn_drop", "block input"])
def test_what_a_hook_changes_counts_as_it_does_without_merging(place: str):
    """One block and the class token: it attends before anything merges, so merging changes nothing."""
    model = tiny(depth=1)
    attention = model.blocks[0].attn
    if place == "attn":
        attention.register_forward_hook(lambda module, args, output: output * 3)
    elif place == "attn_drop":
        attention.fused_attn = False
        attention.attn_drop.register_forward_hook(lambda module, args, output: output * 3)
    else:
        model.blocks[0].register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    wanted = model(images())
    assert not torch.equal(wanted, tiny(depth=1)(images()))
    assert_close(patch.apply(model, r=4)(images()), wanted)


@pytest.mark.parametrize("fused", [True, False])
def test_the_scale_of_attention_is_read_where_timm_reads_it(fused: bool):
    model = tiny(depth=1)
    model.blocks[0].attn.scale, model.blocks[0].attn.fused_attn = 2.0, fused
    wanted = model(images())
    assert_close(patch.apply(model, r=4)(images()), wanted)


def test_attention_maps_are_over_merged_tokens_and_equal_fused_attention():
    model, maps = patch.apply(tiny(), [3, 2, 0]), []
    mask = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    mask[1, ..., 12:] = False
    wanted, masked = model(images()), model(images(), attn_mask=mask)
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output))
    assert_close(model(images()), wanted)
    assert [m.shape[1:] for m in maps] == [(3, 17, 17), (3, 14, 14), (3, 12, 12)]
    for attention in maps:
        assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    maps.clear()
    assert_close(model(images(), attn_mask=mask), masked)
    assert not maps[0][1, ..., 12:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_that_is_written_out_is_as_accurate_as_fused_attention(dtype: torch.dtype):
    """With sizes that bfloat16 cannot hold, and one sample without any real token."""
    attention = tiny(depth=1).blocks[0].attn
    tokens = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(4))
    size = torch.tensor([[1.0, 257, 3, 0, 5, 1, 1, 777, 2], [0.0] * 9])
    truth = attend(copy.deepcopy(attention).double(), tokens.double(), size).tokens
    attention.to(dtype)
    fused = attend(attention, tokens.to(dtype), size).tokens
    attention.fused_attn = False
    written_out = attend(attention, tokens.to(dtype), size).tokens
    assert written_out.dtype == dtype
    assert_as_accurate(written_out, fused, truth)


@pytest.mark.parametrize("impl", list(CheckpointImpl))
@pytest.mark.parametrize("settings", [{"r": 3, "guide": "both"}, {"r": 5, "threshold": 0.5}])
def test_checkpoint_wrappers_recompute_what_was_computed(settings: dict[str, Any], impl: CheckpointImpl):
    wanted = gradients_of(patch.apply(tiny().train(), **settings))
    model = in_wrappers(patch.apply(tiny().train(), **settings), impl)
    assert_all_identical(gradients_of(model), wanted)
    patched_late = patch.apply(in_wrappers(tiny().train(), impl), **settings)
    assert_all_identical(gradients_of(patched_late), wanted)
    assert_all_identical(gradients_of(patch.remove(patched_late)), gradients_of(tiny().train()))


@pytest.mark.parametrize("way", ["wrapper", "of the model"])
def test_a_recomputed_block_follows_the_plan_of_its_first_run(way: str):
    """Even where a guide would say something else the second time."""
    calls = []

    def guide(context: Any) -> Tensor:
        calls.append(len(calls))
        return torch.rand(context.tokens.shape[:2], generator=torch.Generator().manual_seed(len(calls)))

    model = patch.apply(tiny().train(), [4, 0, 0], guide=guide, guide_weight=100.0)
    wanted = gradients_of(model)
    calls.clear()
    if way == "wrapper":
        in_wrappers(model, CheckpointImpl.NO_REENTRANT)
    else:
        model.set_grad_checkpointing(True)
    assert_all_identical(gradients_of(model), wanted)
    assert calls == [0]


@pytest.mark.parametrize("whole", [True, False])
def test_checkpointing_and_graphs_go_together(whole: bool):
    """A graph of the whole model holds its own checkpointing; wrappers of blocks break it, or need PyTorch's switch."""
    wanted = gradients_of(patch.apply(tiny(depth=1).train(), 3))
    model = patch.apply(tiny(depth=1).train(), 3)
    if whole:
        model.set_grad_checkpointing(True)
    else:
        in_wrappers(model, CheckpointImpl.NO_REENTRANT)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=not whole):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for one, other in zip(gradients_of(compiled), wanted, strict=True):
            assert_close(one, other, roundings=64)


def test_passes_share_nothing():
    """Threads, a pass within a pass, and a pass that an error ends leave others as they are."""
    model = patch.apply(tiny(), 3, guide="both")
    inputs = [images(batch) for batch in (1, 2, 3, 4)]
    wanted = [model(x).detach() for x in inputs]
    found: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: model(inputs[i]).detach()})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_all_identical([found[i] for i in range(4)], wanted)

    inner = []

    def within(module: nn.Module, args: Any) -> None:
        if not inner:
            inner.append(None)
            inner[0] = model(inputs[0])

    handle = model.blocks[1].register_forward_pre_hook(within)
    assert_identical(model(inputs[1]), wanted[1])
    assert_identical(inner[0], wanted[0])
    handle.remove()

    def stop(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[2].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(inputs[0])
    handle.remove()
    assert_identical(model(inputs[2]), wanted[2])


def test_flops_are_counted_by_block():
    model, counts = tiny(), []
    for r in (0, 4):
        patch.apply(model, [r, 0, 0])
        with FlopCounterMode(display=False, depth=4) as counter:
            model(images())
        of_blocks = counter.get_flop_counts()
        counts.append([sum(of_blocks[f"{type(model).__name__}.blocks.{i}"].values()) for i in range(3)])
    assert 0 < counts[1][0] < counts[0][0]
    assert counts[1][1] == counts[1][2] < counts[1][0]


def test_a_forward_that_was_replaced_is_called_or_refused():
    model = patch.apply(tiny(), 3)
    wanted = model(images())
    for module in (model.blocks[0], model.blocks[1].attn):
        module.forward = lambda *a, forward=module.forward, **named: forward(*a, **named)
    assert_identical(model(images()), wanted)
    for change, where in [
        (lambda model: model, "model"),
        (lambda model: model.blocks[1], r"model.blocks\[1\]"),
        (lambda model: model.blocks[2].attn, r"model.blocks\[2\].attn"),
    ]:
        model = tiny()
        module = change(model)
        module.forward = module.forward
        with pytest.raises(TypeError, match=rf"^{where}: expected the methods of its class.*forward"):
            patch.apply(model, 3)
