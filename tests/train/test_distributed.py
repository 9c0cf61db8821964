"""Processes that share a batch compute what one process computes on all of it."""

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from mlip_kernels.models import MLIP, FrequencyConfig, LossConfig, MLIPConfig, MLIPLoss
from mlip_kernels.testing import assert_close, assert_identical
from mlip_kernels.train import TrainConfig, checkpoint, logs, train
from mlip_kernels.train.__main__ import parse
from mlip_kernels.train.processes import OtherProcessError, Processes

PAIRS, PROCESSES = 6, 2


def variants(model: MLIPConfig) -> dict[str, MLIPConfig]:
    """Configurations whose terms exchange different things."""
    return {
        "separate domains": model,
        "union, text transform": dataclasses.replace(
            model,
            frequency=dataclasses.replace(model.frequency, order="sequential", mixer="complex_mlp"),
            loss=LossConfig(token_dim=16, token_domains="union", consistency_weight=0.3),
        ),
        "amplitude": dataclasses.replace(
            model, frequency=FrequencyConfig(depth=1, representation="amplitude", text_transform="rfft", pool="mean")
        ),
        "clip": model.clip(),
    }


def step(
    config: MLIPConfig, rank: int, world_size: int, gather: str = "all"
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch, in float64, with the part of the batch that belongs to ``rank``."""
    torch.manual_seed(0)
    model = MLIP(config).double()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(PAIRS, 3, 32, 32, generator=generator, dtype=torch.float64)
    text = torch.randint(1, 400, (PAIRS, config.text.context_length), generator=generator)
    text[:, 0], text[:, 6], text[:, 7:] = 49406, 49407, 0
    images, text = images[rank::world_size], text[rank::world_size]
    parallel = DistributedDataParallel(model) if world_size > 1 else model
    loss = MLIPLoss(config.loss, rank, world_size, gather=gather)(parallel(images, text))["loss"]
    loss.backward()
    if world_size > 1:
        dist.all_reduce(loss.detach_().div_(world_size))
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def fail(rank: int) -> None:
    raise ValueError(f"of process {rank}")


def agree(place: Processes) -> None:
    """Values of the first process arrive in all, and no process waits for one that failed."""
    tensor = torch.arange(4.0, dtype=torch.float64)
    value = {"state": [tensor, {"step": torch.tensor(3)}], "name": ("a", None)}
    received = place.from_first(lambda: value if place.leads else fail(place.rank))
    assert_identical(received["state"][0], tensor)
    assert_identical(received["state"][1]["step"], torch.tensor(3))
    assert received["name"] == ("a", None)
    for failing in range(PROCESSES):
        expected = ValueError if place.rank == failing else OtherProcessError
        with pytest.raises(expected, match=f"process {failing}"):
            place.together(lambda failing=failing: fail(place.rank) if place.rank == failing else None)
    with pytest.raises(ValueError if place.leads else OtherProcessError):
        place.from_first(lambda: fail(place.rank))


def in_each_process(rank: int, model: MLIPConfig, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    agree(Processes(rank, PROCESSES, torch.device("cpu")))
    compare(rank, model)
    dist.destroy_process_group()


def compare(rank: int, model: MLIPConfig) -> None:
    """In one of the processes: equal to what the whole batch gives here."""
    for name, config in variants(model).items():
        expected_loss, expected_gradients = step(config, 0, 1)
        for gather in ("all", "ring") if name == "separate domains" else ("all",):
            loss, gradients = step(config, rank, PROCESSES, gather)
            # Computed in float64, compared to the precision of float32.
            assert_close(loss.float(), expected_loss.float(), name=f"{name}, {gather}")
            for parameter, expected in expected_gradients.items():
                assert_close(gradients[parameter].float(), expected.float(), name=f"{name}, {gather}: {parameter}")


def test_two_processes_agree_and_give_the_loss_and_gradients_of_one(tiny, tmp_path):
    image = dataclasses.replace(tiny.model.image, drop_path=0.0)
    model = dataclasses.replace(tiny.model, image=image)
    multiprocessing.spawn(in_each_process, (model, str(tmp_path / "store")), nprocs=PROCESSES)


ON_A_NODE = (
    "import os, sys\n"
    "os.makedirs(os.environ['RANK'], exist_ok=True)\n"
    "os.chdir(os.environ['RANK'])\n"
    "from mlip_kernels.train.__main__ import main\n"
    "sys.exit(main(sys.argv[1:]))\n"
)


def run_processes(arguments: list[str], folder: Path, processes: int = PROCESSES) -> str:
    """Standard output of ``mlip-train`` under ``torchrun``, each process in a folder of its own, named by its rank."""
    (folder / "on_a_node.py").write_text(ON_A_NODE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "on_a_node.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    finished = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def losses(output: Path) -> torch.Tensor:
    return torch.tensor([value for _, name, value in logs.read(output / "metrics.csv") if name == "loss"])


def small_run(tiny: TrainConfig) -> str:
    """Options of a run of four steps."""
    small = "--model.image.width 32 --model.image.heads 2 --model.image.depth 3 --model.image.image-size 32 "
    small += "--model.text.width 32 --model.text.heads 2 --model.text.depth 1 --model.embed-dim 16 --precision float32 "
    return small + f"--data {tiny.data} --held-out-pairs 12 --steps 4 --log-every 1 --checkpoint-every 2"


def test_the_command_line_gives_the_same_losses_under_torchrun_and_resumed(tiny, tmp_path):
    """Twelve pairs a step, at once or in two micro-batches of two processes that share no folder."""
    small = small_run(tiny)
    alone, shared = tmp_path / "alone", tmp_path / "0" / "shared"
    train(parse([*small.split(), "--output", str(alone), "--batch-size", "12"]))
    share = f"--output shared --batch-size {12 // PROCESSES // 2} --accumulate 2 --gather ring"
    arguments = [*small.split(), *share.split()]
    assert "held-out retrieval among 12 candidates" in run_processes(arguments, tmp_path)
    # Four optimiser steps pass on the rounding of each other.
    in_one_go = losses(shared)
    assert_close(in_one_go, losses(alone), roundings=8.0 * 4**2)
    assert not (tmp_path / "1" / "shared").exists()
    (shared / "checkpoints" / "step-00000004.pt").unlink()
    run_processes([*arguments, "--resume"], tmp_path)
    assert_identical(losses(shared), in_one_go)


@pytest.mark.parametrize("processes", [2, 4])
def test_sharded_towers_train_as_whole_ones_do(tiny, tmp_path, processes):
    """Twelve pairs a step."""
    small = small_run(tiny).split()
    alone, shared = tmp_path / "alone", tmp_path / "0" / "shared"
    train(parse([*small, "--output", str(alone), "--batch-size", "12"]))
    run_processes([*small, "--output", "shared", "--batch-size", str(12 // processes), "--fsdp"], tmp_path, processes)
    assert_close(losses(shared), losses(alone), roundings=8.0 * 4**2)
    sharded, whole = (checkpoint.load(last_checkpoint(folder)) for folder in (shared, alone))
    assert {n: p.shape for n, p in sharded["model"].items()} == {n: p.shape for n, p in whole["model"].items()}
    assert MLIP.from_pretrained(shared / "model").config == MLIP.from_pretrained(alone / "model").config


def test_a_run_continues_sharded_and_whole_again(tiny, tmp_path):
    small, shared = small_run(tiny).split(), tmp_path / "0" / "shared"
    again = ["--resume", "--allow-other", "world_size"]
    alone = parse([*small, "--output", str(shared), "--batch-size", "12", *again])
    train(alone)
    whole = losses(shared)
    last_checkpoint(shared).unlink()
    run_processes([*small, "--output", "shared", "--batch-size", str(12 // PROCESSES), "--fsdp", *again], tmp_path)
    assert_close(losses(shared), whole, roundings=8.0 * 4**2)
    longer = dataclasses.replace(alone, steps=5)
    assert train(longer).steps == 5


def last_checkpoint(output: Path) -> Path:
    return checkpoint.checkpoints(output / "checkpoints")[-1]


def test_the_log_of_a_run_is_a_plain_table(tiny):
    train(dataclasses.replace(tiny, steps=2))
    with (Path(tiny.output) / "metrics.csv").open() as file:
        assert csv.DictReader(file).fieldnames == ["step", "name", "value"]


def test_the_configuration_survives_a_checkpoint():
    config = TrainConfig().model
    assert MLIPConfig.from_dict(config.to_dict()) == config
