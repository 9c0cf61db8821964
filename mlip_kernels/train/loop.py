"""The training loop.

A step is a function of the configuration, the step number and the state that a checkpoint holds: data is addressed by
position, the learning rate by step, and every step seeds its own random numbers. A resumed run therefore continues
bit for bit, and a checkpoint needs no state of any random number generator.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from mlip_kernels import use_reference
from mlip_kernels.data import Batch, ImageTextData, open_data
from mlip_kernels.models import MLIP, MLIPFeatures, MLIPLoss
from mlip_kernels.nn.cached import backward_in_parts
from mlip_kernels.train import checkpoint, resume, zeroshot
from mlip_kernels.train.config import TrainConfig
from mlip_kernels.train.evaluation import NAMES, Retrieval, evaluate
from mlip_kernels.train.lock import exclusive
from mlip_kernels.train.logs import Logs, WandbRun
from mlip_kernels.train.optimizer import build_optimizer, learning_rate
from mlip_kernels.train.precision import resolve
from mlip_kernels.train.pretrained import start_from
from mlip_kernels.train.processes import Processes, processes
from mlip_kernels.train.resume import MODEL, Circumstances, Resumed
from mlip_kernels.train.sharding import (
    clip_gradients,
    load_model,
    load_optimizer,
    own_share,
    shard_towers,
    whole,
    whole_model,
)
from mlip_kernels.train.timing import Stopwatch
from mlip_kernels.train.zeroshot import ClassFolders, classify

STEPS_BETWEEN_QUESTIONS = 10
"""After so many steps several processes ask each other whether to stop, and whenever they log."""


class Outcome(NamedTuple):
    """What a finished or interrupted run reports."""

    steps: int
    """Optimiser steps done."""
    before: dict[str, float]
    """Recall on held-out pairs before the first step."""
    after: dict[str, float]
    """Recall after the last step."""
    planned: int
    """Optimiser steps of the whole run."""
    zeroshot: dict[str, float]
    """Zero-shot classification after the last step; empty unless there is a folder for it."""
    pairs_per_second: float
    """Training throughput of all processes, evaluation and checkpoints left out; NaN if this call did no step."""
    retrieval: Retrieval
    """The last evaluation."""
    model: MLIP
    data: ImageTextData


def train(config: TrainConfig) -> Outcome | None:
    """Run ``config`` to its end, or to the first SIGINT or SIGTERM, which checkpoint and stop.

    What a reader of the results should know (the precision, what changed since the checkpoint) goes to standard error.

    Returns:
        The outcome, or ``None`` in processes other than the first.

    Raises:
        ValueError: for a bad configuration, a run in the way or at work, or a checkpoint that cannot be continued;
            before work starts.
        OSError: if a file is missing or cannot be read or written; names it.
        FloatingPointError: if the loss or a gradient stops being finite; the message names the step and the terms.
        OtherProcessError: if another process of the run raises one of these.
    """
    operators = use_reference() if config.operators == "reference" else contextlib.nullcontext()
    with processes(config.device) as place, operators, contextlib.ExitStack() as stack:
        data = place.together(lambda: open_data(config.data_config(), rank=place.rank, world_size=place.world_size))
        lock = exclusive(Path(config.output)) if place.leads else contextlib.nullcontext()
        place.together(lambda: stack.enter_context(lock))
        return Run(config, place, data).complete()


class Run:
    """State of one run in one process."""

    def __init__(self, config: TrainConfig, place: Processes, data: ImageTextData) -> None:
        config = config.in_steps(data.batches_per_epoch)
        self.config, self.place, self.data = config, place, data
        self.folder = Path(config.output)
        digests = place.all_of(data.digest())
        folder = config.zeroshot
        self.classes = None if folder is None else place.together(lambda: ClassFolders(Path(folder)))
        self.precision = place.from_first(lambda: resolve(config.precision, place.device))
        self.circumstances = Circumstances(
            data=digests[0],
            world_size=place.world_size,
            precision=self.precision.name,
            device=place.device.type,
            threads=torch.get_num_threads(),
            torch=torch.__version__.partition("+")[0],
        )
        self._say(f"precision {self.precision.name}: {self.precision.reason}")
        resumed = place.from_first(lambda: self._resumed(digests))
        torch.manual_seed(config.seed)
        self.model = MLIP(config.model)
        if (pretrained := config.pretrained) is not None and resumed is None:
            self._say(place.together(lambda: start_from(pretrained, self.model)))
        self.model.to(place.device)
        if config.lock_image:
            self.model.lock_image_tower(config.lock_image_unlocked_groups)
        if config.lock_text:
            self.model.lock_text_tower(config.lock_text_unlocked_layers)
        self.model.set_gradient_checkpointing(config.gradient_checkpointing)
        if config.fsdp and place.world_size > 1:
            shard_towers(self.model, place.world_size, place.device)
        self.optimizer = build_optimizer(self.model, config)
        self.step = 0
        self.before: dict[str, float] | None = None
        self.history: list[dict[str, Any]] = []
        if resumed is not None:
            place.together(lambda: self._continue(resumed))
        self.loss = MLIPLoss(config.model.loss, place.rank, place.world_size, gather=config.gather)
        self.parallel: nn.Module = self.model
        if config.torchcompile:
            self.parallel = torch.compile(self.parallel)  # type: ignore[assignment]  # a module stays one
        if place.world_size > 1:
            self.parallel = DistributedDataParallel(self.parallel)
        self.autocast = self.precision.autocast(place.device)
        self.wandb = place.together(self._open_wandb)
        self.stopwatch = Stopwatch(place.device)
        self.interrupted = False

    def _open_wandb(self) -> WandbRun | None:
        if not self.place.leads or "wandb" not in self.config.report_to:
            return None
        return WandbRun(self.folder, self.config.wandb_project_name, self.config.to_dict())

    def _say(self, message: str) -> None:
        if self.place.leads:
            tqdm.write(f"mlip-train: {message}", file=sys.stderr)

    def _resumed(self, digests: list[str]) -> Resumed | None:
        """What to continue from, in the first process; an earlier run that is to be replaced is gone afterwards."""
        differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if differing:
            raise ValueError(f"data: process {differing[0]} sees other pairs than process 0")
        path = resume.find(self.config)
        resumed = None if path is None else resume.load(path, self.config, self.circumstances)
        for deed in resume.clear_the_way(self.config, resumed):
            self._say(deed)
        return resumed

    def _continue(self, resumed: Resumed) -> None:
        """Take over the state of a checkpoint."""
        state = resumed.state
        given = [{name: group[name] for name in group if name != "params"} for group in self.optimizer.param_groups]
        try:
            load_model(self.model, state["model"])
            load_optimizer(self.optimizer, state["optimizer"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as failure:
            reason = " ".join(str(failure).split())
            raise ValueError(f"{resumed.path}: its parameters do not fit the model: {reason[:300]}") from failure
        for group, options in zip(self.optimizer.param_groups, given, strict=True):
            group.update(options)
        self.step, self.before, self.history = state["step"], state["before"], state["history"]
        self._say(f"continuing from step {self.step} of {resumed.path}")
        if resumed.changes:
            self.history.append({"step": self.step, "changes": resumed.changes})
            self._say(f"from here on the numbers are not those of the run as it was: {'; '.join(resumed.changes)}")

    def complete(self) -> Outcome | None:
        """Train from the current step to the last."""
        if not self.place.leads:
            return self._complete(None)
        finished = self.step == self.config.steps  # then it evaluates once more
        repeated = (*NAMES, *zeroshot.NAMES) if finished else ()
        with contextlib.closing(Logs(self.folder, self.step + 1, repeated, self.wandb)) as logs:
            for entry in self.history:
                logs.note(entry["step"], "; ".join(entry["changes"]))
            return self._complete(logs)

    def _complete(self, logs: Logs | None) -> Outcome | None:
        config, place = self.config, self.place
        first = self.step
        if self.before is None:
            self.before = self._evaluate().recall
        with (
            self._stop_on_signal(),
            tqdm(total=config.steps, initial=first, desc="train", unit="step", disable=not place.leads) as bar,
        ):
            batches = self._micro_batches(self.step * config.accumulate)
            stopping = False
            self.stopwatch.start()
            while self.step < config.steps and not stopping:
                terms, norm = self._optimise(batches)
                self.step += 1
                bar.update()
                stopping = self._stop_requested()
                last = stopping or self.step == config.steps
                saving = last or self.step % config.checkpoint_every == 0
                logging = saving or self.step % config.log_every == 0
                evaluating = config.evaluate_every and self.step % config.evaluate_every == 0 and not last
                if not (logging or evaluating):
                    continue
                self.stopwatch.stop()
                if logging:
                    scalars = self._scalars(terms, norm, self.step - first)
                    bar.set_postfix(loss=f"{scalars['loss']:.3f}", pairs_per_s=f"{scalars['pairs_per_second']:.0f}")
                    if logs is not None:
                        logs.write(self.step, scalars)
                if evaluating:
                    figures = self._evaluate().recall | self._classify()
                    if logs is not None:
                        logs.write(self.step, figures)
                if saving:
                    self._save(logs)
                self.stopwatch.start()
        retrieval, classified = self._evaluate(), self._classify()
        model = whole_model(self.model)
        if logs is None:
            return None
        logs.write(self.step, retrieval.recall | classified)
        model.save_pretrained(self.folder / MODEL)
        seconds = self.stopwatch.seconds
        return Outcome(
            steps=self.step,
            before=self.before,
            after=retrieval.recall,
            planned=config.steps,
            zeroshot=classified,
            pairs_per_second=self._pairs(self.step - first) / seconds if seconds else math.nan,
            retrieval=retrieval,
            model=model,
            data=self.data,
        )

    def _optimise(self, batches: Iterator[Batch]) -> tuple[dict[str, Tensor], Tensor]:
        """One optimiser step; the loss terms of its micro-batches as one batch, and the norm of the gradient."""
        config, place = self.config, self.place
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        self.parallel.train()
        self.optimizer.zero_grad(set_to_none=True)
        parts = [next(batches) for _ in range(config.accumulate)]
        # A compiled model would be compiled for every step that it is told.
        warming_up = self.step if self.step < config.model.merging.warmup_steps else None

        def encode(number: int) -> MLIPFeatures:
            # The same random numbers each time. The last micro-batch has those of a step without others.
            behind = config.accumulate - 1 - number
            torch.manual_seed(_seed(config.seed, self.step, place.rank, *([behind] if behind else [])))
            images = parts[number].images.to(place.device, non_blocking=True)
            text = parts[number].text.to(place.device, non_blocking=True)
            with self.autocast:
                return self.parallel(images, text, step=warming_up)

        def loss(features: MLIPFeatures) -> dict[str, Tensor]:
            with self.autocast:
                return self.loss(features)

        terms = backward_in_parts(config.accumulate, encode, loss, self._exchange_gradients)
        limit = config.clip_gradients or math.inf
        norm = clip_gradients(self.model.parameters(), limit)
        self.optimizer.step()
        self.model.clamp_logit_scales()
        return terms, norm

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
        values["gradient_norm"] = float(norm)
        self._require_finite(values)
        scales = {n: float(p.detach().exp()) for n, p in self.model.named_parameters() if n.startswith("logit_scale")}
        return {
            **values,
            **scales,
            "learning_rate": learning_rate(self.step - 1, self.config),
            "pairs_per_second": self._pairs(steps) / self.stopwatch.seconds,
        }

    def _require_finite(self, values: dict[str, float]) -> None:
        """Raise if one of ``values`` is not finite; what is said of checkpoints is looked up in the folder."""
        poor = [name for name, value in values.items() if not math.isfinite(value)]
        if poor:
            saved = checkpoint.checkpoints(self.folder / "checkpoints")
            kept = f"{saved[-1]} is from before, and --resume continues it" if saved else "no checkpoint had been saved"
            raise FloatingPointError(
                f"{', '.join(poor[:5])}: not finite after step {self.step}; nothing of it was saved, {kept}. "
                "Try a lower --learning-rate or --precision float32"
            )

    def _require_finite_state(self) -> None:
        """Raise if a parameter or a moment of the optimiser is not finite."""
        states = {f"parameter {name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, moment in self.optimizer.state.get(parameter, {}).items():
                states[f"{key} of {name}"] = moment
        states = {name: own for name, state in states.items() if (own := own_share(state)).numel()}
        largest = torch.stack([state.abs().amax().float() for state in states.values()]).tolist()
        self._require_finite(dict(zip(states, largest, strict=True)))

    def _pairs(self, steps: int) -> int:
        return steps * self.config.accumulate * self.config.batch_size * self.place.world_size

    def _evaluate(self) -> Retrieval:
        return evaluate(self.model, self.data.held_out(self.config.batch_size), self.place.device, self.autocast)

    def _classify(self) -> dict[str, float]:
        if self.classes is None:
            return {}
        config = self.config
        return classify(self.model, self.classes, self.place.device, self.autocast, config.batch_size, config.workers)

    def _save(self, logs: Logs | None) -> None:
        self.place.together(self._require_finite_state)
        model, optimizer = whole(self.model.state_dict()), whole(self.optimizer.state_dict())

        def write() -> None:
            if logs is None:
                return
            logs.synchronise()  # the rows up to a checkpoint are on disk before it is
            state = {
                "step": self.step,
                "model": model,
                "optimizer": optimizer,
                "before": self.before,
                "config": self.config.to_dict(),
                "circumstances": self.circumstances._asdict(),
                "history": self.history,
            }
            checkpoint.save(self.folder / "checkpoints", self.step, state, self.config.keep_checkpoints)

        self.place.together(write)

    def _stop_requested(self) -> bool:
        """Whether a process of the run was interrupted, so that all of them stop after the same step.

        Several processes ask each other in some steps only: the answer waits for the devices.
        """
        if self.place.world_size > 1 and self.step % self.config.log_every and self.step % STEPS_BETWEEN_QUESTIONS:
            return False
        return self.place.any(self.interrupted)

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


def _seed(*numbers: int) -> int:
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
