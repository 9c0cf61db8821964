"""AdamW and the learning rate of a step."""

from __future__ import annotations

import math

import torch
from torch import nn

from mlip_kernels.train.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, as CLIP: not on biases, norms and logit scales."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # Sharded and whole parameters cannot be updated in one launch.
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=not config.fsdp, foreach=False
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rising linearly over ``warmup_steps``, then falling to 0 along a cosine; a function of the step alone."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2
