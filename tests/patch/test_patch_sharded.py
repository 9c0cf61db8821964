"""Patched models under FSDP2, FSDP1 and DistributedDataParallel compute what they compute without."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_eva
import torch
import torch.distributed as dist
from timm.models.vision_transformer import Block, VisionTransformer
from tiny_vit import images, tiny
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from mlip_kernels.patch import timm as patch
from mlip_kernels.testing import assert_close, assert_identical


@pytest.fixture(scope="module", autouse=True)
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """A group of one process: everything of the wrappers runs but the exchange."""
    store: Path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(model: nn.Module, mesh: DeviceMesh, parts: str) -> nn.Module:
    for block in model.blocks:
        if parts == "attention":
            fully_shard(block.attn, mesh=mesh)
        fully_shard(block, mesh=mesh)
    return model if parts == "blocks" else fully_shard(model, mesh=mesh)


def whole(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def trained(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    output = model(images())
    output.square().sum().backward()
    return output.detach(), [whole(parameter.grad) for parameter in model.parameters()]


@pytest.fixture(scope="module")
def wanted() -> tuple[Tensor, list[Tensor]]:
    return trained(patch.apply(tiny().train(), 3, guide="both"))


@pytest.mark.parametrize("parts", ["model", "blocks", "attention"])
@pytest.mark.parametrize("order", ["apply, shard", "shard, apply"])
def test_fsdp2_before_and_after_the_patch(
    order: str, parts: str, mesh: DeviceMesh, wanted: tuple[Tensor, list[Tensor]]
):
    model = tiny().train()
    if order == "apply, shard":
        sharded(patch.apply(model, 3, guide="both"), mesh, parts)
    else:
        patch.apply(sharded(model, mesh, parts), 3, guide="both")
    assert isinstance(model.blocks[0], FSDPModule)
    output, gradients = trained(model)
    assert_identical(output, wanted[0])
    for one, other in zip(gradients, wanted[1], strict=True):
        assert_identical(one, other)
    model.r = 2
    assert model.forward_merged(images())[0].shape[1] == 17 - 6
    patch.apply(model, keep_rate=0.5, layers=[1])
    assert model.forward_merged(images())[0].shape[1] == 1 + 8
    patch.remove(model)
    assert not hasattr(model, "merging")
    assert isinstance(model.blocks[0], FSDPModule)
    assert [kind.__name__ for kind in type(model.blocks[0]).__mro__[:3]] == ["FSDPBlock", "FSDPModule", "Block"]
    assert isinstance(model, VisionTransformer)
    assert_identical(trained(model)[0], tiny().train()(images()))
    patch.apply(model, 3, guide="both")
    assert_identical(trained(model)[0], wanted[0])


def fully_sharded(model: nn.Module) -> nn.Module:
    policy = ModuleWrapPolicy({Block})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True)


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_sharded])
@pytest.mark.parametrize("order", ["apply, wrap", "wrap, apply"])
def test_wrappers_of_the_model_before_and_after_the_patch(
    order: str, wrap: Callable[[nn.Module], nn.Module], wanted: tuple[Tensor, list[Tensor]]
):
    model = tiny().train()
    if order == "apply, wrap":
        wrapped = wrap(patch.apply(model, 3, guide="both"))
    else:
        wrapped = patch.apply(wrap(model), 3, guide="both")
    output, gradients = trained(wrapped)
    assert_identical(output, wanted[0])
    for one, other in zip(gradients, wanted[1], strict=True):
        assert_close(one.reshape(-1), other.reshape(-1))
    tokens, size, plan = wrapped(images(), merged=True)
    assert tokens.shape[1] == size.shape[1] == plan.merged_tokens == 17 - 9
    patch.remove(wrapped)
    assert type(patch.transformer(wrapped)) is VisionTransformer
    with torch.no_grad():
        assert_identical(wrapped(images()), tiny().train()(images()))


@pytest.mark.parametrize("wrap", ["FSDP2", "DistributedDataParallel"])
def test_rotary_frequencies_train_in_wrappers(wrap: str, mesh: DeviceMesh):
    output, gradients = trained(patch.apply(tiny_eva.tiny("vit_small_patch16_rope_mixed_224").train(), 3))
    model = patch.apply(tiny_eva.tiny("vit_small_patch16_rope_mixed_224").train(), 3)
    model = sharded(model, mesh, "model") if wrap == "FSDP2" else DistributedDataParallel(model)
    found = trained(model)
    assert_identical(found[0], output)
    for one, other in zip(found[1], gradients, strict=True):
        assert_identical(one, other)
