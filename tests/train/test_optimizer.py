"""Learning rate and weight decay."""

import pytest
import torch
from torch import nn

from mlip_kernels.train import TrainConfig
from mlip_kernels.train.optimizer import build_optimizer, learning_rate


def test_the_learning_rate_rises_linearly_and_falls_to_zero():
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate(0, TrainConfig(warmup_steps=0, learning_rate=0.5)) == pytest.approx(0.5)


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    model.register_parameter("logit_scale", nn.Parameter(torch.zeros(())))
    decayed, free = build_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert [p.shape for p in decayed["params"]] == [(3, 2)]
    assert decayed["weight_decay"] == 0.3
    assert len(free["params"]) == 4
    assert free["weight_decay"] == 0.0
