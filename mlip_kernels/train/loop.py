"""The training loop.

A step is a function of the configuration, the step number and the state that a checkpoint holds: data is addressed by
position, the learning rate by step, and every step seeds its own random numbers. A resumed run therefore continues
bit for bit, and a checkpoint needs no state of any random number generator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from mlip_kernels import use_reference
from mlip_kernels.data import Batch, ImageTextData, open_data
from mlip_kernels.models import MLIP, MLIPConfig, MLIPLoss
from mlip_kernels.train import checkpoint
from mlip_kernels.train.config import TrainConfig
from mlip_kernels.train.evaluation import Retrieval, evaluate
from mlip_kernels.train.logs import Logs
from mlip_kernels.train.optimizer import build_optimizer, learning_rate
from mlip_kernels.train.processes import Processes, processes


class Outcome(NamedTuple):
    """What a finished or interrupted run reports."""

    steps: int
    """Optimiser steps done."""
    before: dict[str, float]
    """Recall on held-out pairs before the first step."""
    after: dict[str, float]
    """Recall after the last step."""
    pairs_per_second: float
    """Training throughput of all processes, evaluation and checkpoints left out; NaN if this call did no step."""
    retrieval: Retrieval
    """The last evaluation."""
    model: MLIP
    data: ImageTextData


def train(config: TrainConfig) -> Outcome | None:
    """Run ``config`` to its end, or to the first SIGINT or SIGTERM, which checkpoint and stop.

    Returns:
        The outcome, or ``None`` in processes other than the first.

    Raises:
        ValueError, FileNotFoundError: for a bad configuration, missing data or a run in the way; before work starts.
        FloatingPointError: if the loss stops being finite; the message names the step and the terms.
    """
    operators = use_reference() if config.operators == "reference" else contextlib.nullcontext()
    with processes(config.device) as place, operators:
        return Run(config, place).complete()


class Run:
    """State of one run in one process."""

    def __init__(self, config: TrainConfig, place: Processes) -> None:
        self.config, self.place = config, place
        self.folder = Path(config.output)
        self.data = open_data(config.data_config(), rank=place.rank, world_size=place.world_size)
        saved = self._saved_state()
        torch.manual_seed(config.seed)
        self.model = MLIP(config.model).to(place.device)
        self.model.set_gradient_checkpointing(config.gradient_checkpointing)
        self.optimizer = build_optimizer(self.model, config)
        self.step, self.before, self.seconds = 0, None, 0.0
        if saved is not None:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.before = saved["step"], saved["before"]
        self.loss = MLIPLoss(config.model.loss, place.rank, place.world_size, gather=config.gather)
        self.parallel: nn.Module = self.model
        if place.world_size > 1:
            self.parallel = DistributedDataParallel(self.model)
        self.autocast = torch.autocast(place.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
        self.interrupted = False

    def _saved_state(self) -> dict | None:
        """State to resume from; refuses to mix a new run with an earlier one."""
        found = checkpoint.checkpoints(self.folder / "checkpoints")
        self.place.wait()
        if self.config.resume and found:
            state = checkpoint.load(found[-1])
            saved_model = MLIPConfig.from_dict(state["config"]["model"])
            if saved_model != self.config.model:
                raise ValueError(f"resume: {found[-1]} holds another model configuration; give the options of that run")
            changed = _changed(state["config"], self.config.to_dict())
            if changed:
                raise ValueError(f"resume: {found[-1]} was made with other options: {changed}")
            return state
        if found and not self.config.overwrite:
            raise ValueError(
                f"output: {self.folder} holds a run ({found[-1].name}); pass --resume to continue it, --overwrite to "
                "replace it, or another --output"
            )
        if self.place.leads and self.config.overwrite and self.folder.exists():
            for part in ("checkpoints", "tensorboard"):
                shutil.rmtree(self.folder / part, ignore_errors=True)
            (self.folder / "metrics.csv").unlink(missing_ok=True)
        self.place.wait()
        return None

    def complete(self) -> Outcome | None:
        """Train from the current step to the last."""
        config, place = self.config, self.place
        logs = Logs(self.folder, self.step + 1) if place.leads else None
        first = self.step
        if self.before is None:
            self.before = self._evaluate().recall
        with self._stop_on_signal():
            batches = self._micro_batches(self.step * config.accumulate)
            bar = tqdm(total=config.steps, initial=self.step, desc="train", unit="step", disable=not place.leads)
            stopping = False
            while self.step < config.steps and not stopping:
                began = time.perf_counter()
                terms, norm = self._optimise(batches)
                self.seconds += time.perf_counter() - began
                self.step += 1
                bar.update()
                stopping = place.any(self.interrupted)
                last = stopping or self.step == config.steps
                saving = last or self.step % config.checkpoint_every == 0
                if saving or self.step % config.log_every == 0:
                    scalars = self._scalars(terms, norm, self.step - first)
                    bar.set_postfix(loss=f"{scalars['loss']:.3f}", pairs_per_s=f"{scalars['pairs_per_second']:.0f}")
                    if logs is not None:
                        logs.write(self.step, scalars)
                if config.evaluate_every and self.step % config.evaluate_every == 0 and not last:
                    recall = self._evaluate().recall
                    if logs is not None:
                        logs.write(self.step, recall)
                if saving:
                    self._save()
            bar.close()
        retrieval = self._evaluate()
        if logs is None:
            return None
        logs.write(self.step, retrieval.recall)
        logs.close()
        return Outcome(
            steps=self.step,
            before=self.before,
            after=retrieval.recall,
            pairs_per_second=self._pairs(self.step - first) / self.seconds if self.seconds else math.nan,
            retrieval=retrieval,
            model=self.model,
            data=self.data,
        )

    def _optimise(self, batches: Iterator[Batch]) -> tuple[dict[str, Tensor], Tensor]:
        """One optimiser step; the loss terms averaged over its micro-batches, and the norm of the gradient."""
        config, place = self.config, self.place
        torch.manual_seed(_seed(config.seed, self.step, place.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        self.parallel.train()
        self.optimizer.zero_grad(set_to_none=True)
        total: dict[str, Tensor] = {}
        for micro in range(config.accumulate):
            batch = next(batches)
            images = batch.images.to(place.device, non_blocking=True)
            text = batch.text.to(place.device, non_blocking=True)
            with self._exchange_gradients(micro == config.accumulate - 1):
                with self.autocast:
                    features = self.parallel(images, text, step=self.step)
                    terms = self.loss(features)
                (terms["loss"] / config.accumulate).backward()
            for name, term in terms.items():
                total[name] = total.get(name, 0.0) + term.detach() / config.accumulate
        limit = config.clip_gradients or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.model.clamp_logit_scales()
        return total, norm

    def _exchange_gradients(self, now: bool) -> contextlib.AbstractContextManager:
        """DDP sums gradients over the processes in the last micro-batch only."""
        if now or not isinstance(self.parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def _micro_batches(self, first: int) -> Iterator[Batch]:
        """Batches from number ``first`` on, epoch after epoch."""
        epoch, skip = divmod(first, self.data.batches_per_epoch)
        while True:
            yield from self.data.train(epoch, skip)
            epoch, skip = epoch + 1, 0

    def _scalars(self, terms: dict[str, Tensor], norm: Tensor, steps: int) -> dict[str, float]:
        values = {name: float(self.place.mean(term)) for name, term in terms.items()}
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the loss is not finite after step {self.step}: {values}; the last checkpoint is intact. "
                "Try a lower --learning-rate or --precision float32"
            )
        scales = {n: float(p.detach().exp()) for n, p in self.model.named_parameters() if n.startswith("logit_scale")}
        return {
            **values,
            **scales,
            "gradient_norm": float(norm),
            "learning_rate": learning_rate(self.step - 1, self.config),
            "pairs_per_second": self._pairs(steps) / self.seconds,
        }

    def _pairs(self, steps: int) -> int:
        return steps * self.config.accumulate * self.config.batch_size * self.place.world_size

    def _evaluate(self) -> Retrieval:
        return evaluate(self.model, self.data.held_out(self.config.batch_size), self.place.device, self.autocast)

    def _save(self) -> None:
        if self.place.leads:
            state = {
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "before": self.before,
                "config": self.config.to_dict(),
            }
            checkpoint.save(self.folder / "checkpoints", self.step, state, self.config.keep_checkpoints)
        self.place.wait()

    @contextlib.contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """Finish the current step and checkpoint when asked to stop; a second signal stops at once."""
        handlers: dict[int, Any] = {}

        def stop(number: int, _frame: object) -> None:
            self.interrupted = True
            signal.signal(number, handlers[number])

        # Python delivers signals to the main thread, and refuses handlers from any other.
        in_main_thread = threading.current_thread() is threading.main_thread()
        for signal_number in (signal.SIGINT, signal.SIGTERM) if in_main_thread else ():
            handlers[signal_number] = signal.signal(signal_number, stop)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


MAY_CHANGE = {
    "checkpoint_every",
    "cache_dir",
    "device",
    "evaluate_every",
    "gather",
    "keep_checkpoints",
    "log_every",
    "operators",
    "output",
    "overwrite",
    "resume",
    "workers",
}
"""Options that a resumed run may give anew, since they do not change what is computed."""


def _changed(saved: dict, now: dict) -> str:
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    listed = [name for name in names if name not in MAY_CHANGE | {"model"}]

    def plain(value: object) -> object:
        return list(value) if isinstance(value, tuple) else value

    differing = [name for name in listed if plain(saved.get(name)) != plain(now[name])]
    return ", ".join(f"{name} was {saved.get(name)!r}, now {now[name]!r}" for name in differing)


def _seed(*numbers: int) -> int:
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
