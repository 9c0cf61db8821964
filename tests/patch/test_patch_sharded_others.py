"""Patched towers of open_clip and Hugging Face under FSDP2, FSDP1 and DistributedDataParallel, as without."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_open_clip
import torch
import torch.distributed as dist
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers", reason="needs transformers: pip install transformers")

import tiny_transformers
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from mlip_kernels.patch import open_clip, transformers
from mlip_kernels.testing import assert_close, assert_identical


class Case(NamedTuple):
    patch: Any
    tiny: Callable[[], nn.Module]
    layers: Callable[[nn.Module], Any]
    layer: type[nn.Module]
    run: Callable[[nn.Module], Tensor]


CASES = {
    "open_clip": Case(
        open_clip,
        tiny_open_clip.tiny,
        lambda model: model.transformer.resblocks,
        ResidualAttentionBlock,
        lambda model: model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))),
    ),
    "CLIP": Case(
        transformers,
        lambda: tiny_transformers.tiny("CLIP"),
        lambda model: model.encoder.layers,
        CLIPEncoderLayer,
        lambda model: model(**tiny_transformers.inputs("CLIP")).pooler_output,
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(scope="module", autouse=True)
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """A group of one process: everything of the wrappers runs but the exchange."""
    store: Path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def trained(case: Case, model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    output = case.run(model)
    output.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return output.detach(), [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]


def assert_trains_alike(case: Case, model: nn.Module) -> None:
    output, gradients = trained(case, model)
    wanted, of_parameters = trained(case, case.patch.apply(case.tiny().train(), 3))
    assert_identical(output, wanted)
    for one, other in zip(gradients, of_parameters, strict=True):
        assert_close(one.reshape(-1), other.reshape(-1))


@every_case
@pytest.mark.parametrize("order", ["apply, shard", "shard, apply"])
def test_fsdp2_before_and_after_the_patch(case: Case, order: str, mesh: DeviceMesh):
    model = case.tiny().train()
    if order == "apply, shard":
        case.patch.apply(model, 3)
    for layer in case.layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if order == "shard, apply":
        case.patch.apply(model, 3)
    assert isinstance(case.layers(model)[0], FSDPModule)
    assert_trains_alike(case, model)
    case.patch.remove(model)
    assert not any(type(module).__module__.startswith("mlip_kernels") for module in model.modules())
    with torch.no_grad():
        assert_identical(case.run(model), case.run(case.tiny().train()))


@every_case
@pytest.mark.parametrize("order", ["apply, wrap", "wrap, apply"])
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP1"])
def test_wrappers_of_the_model_before_and_after_the_patch(case: Case, order: str, wrapper: str):
    def wrap(model: nn.Module) -> nn.Module:
        if wrapper == "DDP":
            return DistributedDataParallel(model, find_unused_parameters=True)
        policy, cpu = ModuleWrapPolicy({case.layer}), torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=cpu, use_orig_params=True)

    model = case.tiny().train()
    wrapped = wrap(case.patch.apply(model, 3)) if order == "apply, wrap" else case.patch.apply(wrap(model), 3)
    assert_trains_alike(case, wrapped)
    case.patch.remove(wrapped)
    with torch.no_grad():
        assert_identical(case.run(wrapped), case.run(case.tiny().train()))
