"""Towers whose parameters, gradients and moments are spread over the processes, by FSDP2.

The blocks of the towers and the embedding of the text are sharded, each a unit that is gathered while it computes. What
is left (projections, positions, norms, logit scales) is small, and stays replicated under DDP. A checkpoint holds whole
tensors, so a run may continue sharded or not, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mlip_kernels.models import MLIP


def shard_towers(model: MLIP, world_size: int, device: torch.device) -> None:
    """Shard the blocks of ``model`` in place; `DistributedDataParallel` then leaves their parameters alone."""
    mesh = init_device_mesh(device.type, (world_size,))
    stages = [stage for stage in (model.frequency_stage, model.text_frequency_stage) if stage is not None]
    for unit in (
        *model.visual.trunk.blocks,
        *model.text.transformer.resblocks,
        model.text.token_embedding,
        *stages,
    ):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)


def whole(value: Any) -> Any:
    """A nested state with whole tensors in place of sharded ones; all processes have to ask."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return type(value)((key, whole(item)) for key, item in value.items())
    return value


def whole_model(model: MLIP) -> MLIP:
    """``model``, or a copy of one that is sharded, with whole parameters; all processes have to ask."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model
    state = whole(model.state_dict())
    copy = MLIP(model.config, model.preprocessing).train(model.training)
    copy.load_state_dict(state)
    return copy.to(next(iter(state.values())).device)


def own_share(value: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def as_sharded(value: Tensor, like: Tensor) -> Tensor:
    """The whole tensor ``value``, sharded as ``like`` is."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """``model.load_state_dict`` of whole tensors."""
    there = model.state_dict()
    model.load_state_dict({name: as_sharded(value, there.get(name, value)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict`` of whole tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharded = {
        place: {
            name: as_sharded(value, parameters[place])
            if isinstance(value, Tensor) and place < len(parameters)
            else value
            for name, value in moments.items()
        }
        for place, moments in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": sharded})


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """``nn.utils.clip_grad_norm_``, also for gradients of which this process has a share."""
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shares = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    if not shares:
        return nn.utils.clip_grad_norm_(parameters, limit)
    replicated = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    squares = nn.utils.get_total_norm(shares).square()
    torch.distributed.all_reduce(squares)
    total = (squares + nn.utils.get_total_norm(replicated).square()).sqrt()
    torch._foreach_mul_([*shares, *replicated], (limit / (total + 1e-6)).clamp(max=1.0))
    return total
