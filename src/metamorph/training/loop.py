"""The training loop: for the LLM, the decoder and every pretrained part, on one process and on many.

A step function turns a model and a batch into losses; the loop divides each by the number of its targets in the whole step, over all
micro-batches and processes, and does the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from metamorph.errors import CheckpointError, ConfigError, TrainingError
from metamorph.training.checkpoint import (
    Companion,
    Stateful,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    read_details,
    save_checkpoint,
)
from metamorph.training.config import TrainingConfig
from metamorph.training.device import choose_precision, pick_device, processes, rank, world_size
from metamorph.training.optim import build_optimizer, check_optimizer, set_learning_rate
from metamorph.training.source_losses import ShortenedRows, SourceLosses
from metamorph.training.stepping import Engine, StepFunction, TrainingBatch, check_losses, clip_gradients, count_tokens, share_counts
from metamorph.training.trackers import MetricsFile, TerminalTracker, Tracker

Evaluator = Callable[[Any, int], Mapping[str, Any]]


@runtime_checkable
class Stream(Stateful, Protocol):
    """Batches without end: each item holds the micro-batches of one step on this process. The state is that of what was taken."""

    def __next__(self) -> list[Any]:
        """The micro-batches of the next step."""
        ...


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` went."""

    step: int
    """Updates made in all, those before a resume included."""
    history: list[dict[str, Any]] = field(repr=False)
    """The rows logged by this call."""
    seconds: float
    precision: str
    checkpoint: Path
    """The last one, after the last step."""


def train(
    step: StepFunction,
    model: nn.Module,
    stream: Stream,
    config: TrainingConfig,
    run_dir: Path | str,
    *,
    stage: str = "train",
    evaluators: Mapping[str, Evaluator] | None = None,
    tracker: Tracker | None = None,
    companions: Mapping[str, Companion] | None = None,
    resume: bool = False,
    start: Path | None = None,
    replicate: Sequence[str] = (),
) -> TrainResult:
    """Train what requires a gradient in `model`, in place.

    Args:
        step: model, batch -> for each kind of loss its sum over targets, and their number, which must be `batch.target_counts[kind]`.
        model: the whole model; frozen parts have `requires_grad` off.
        stream: gives the micro-batches of each step; a batch has `target_counts`, `.to(device)` and, for error messages, `ids`. Where it
            has `sources` and `documents_of_targets()`, losses are logged by source, too; so are
            rows shortened (`turns_cut`) and, where the stream has `bad_records`, rows skipped.
        config: steps, rates, precision and so on.
        run_dir: gets metrics.jsonl and checkpoints/<stage>/.
        stage: names the checkpoints and the rows of metrics.
        evaluators: model, number of updates -> numbers to log; random states are kept from them.
        tracker: shows progress; None = the terminal.
        companions: what follows the weights, such as an EMA; saved and resumed with them.
        resume: go on from the last complete checkpoint of this stage, if there is one.
        start: checkpoint (of an earlier stage) that gives the weights when there is none to resume from.
        replicate: frozen modules that every process keeps whole: those that not every batch runs, such as a vision encoder.

    Raises:
        ConfigError: nothing to train, no steps, a device that is missing, or Muon on several processes.
        NonFiniteLossError: with step and record ids; the weights are those before the step.
        AlignmentError: the number of targets of a loss is not the batch's.
        CheckpointError: there are checkpoints but `resume` is off, or they do not fit.
        TrainingError: the stream ends before the last step.
    """
    if config.steps < 1:
        raise ConfigError(f"{config.steps} steps but at least 1 is needed ({stage}). Set steps.")
    device = pick_device(config.device)
    with processes(device):
        check_optimizer(config)
        checkpoints = Path(run_dir) / "checkpoints" / stage
        last = _last_checkpoint(checkpoints, resume)
        engine = _prepare(step, model, config, device, last, replicate)
        optimizer = build_optimizer(model, config)
        done = _restore(model, optimizer, stream, companions or {}, last, start)
        trackers = _open_trackers(Path(run_dir), stage, done if last else -1, tracker, config.steps)
        try:
            return _Loop(engine, optimizer, stream, config, stage, checkpoints, trackers, companions or {}, done).run(evaluators or {})
        finally:
            for one in trackers:
                one.close()


@dataclass
class _Loop:
    """What the loop holds."""

    engine: Engine
    optimizer: torch.optim.Optimizer
    stream: Stream
    config: TrainingConfig
    stage: str
    checkpoints: Path
    trackers: list[Tracker]
    companions: Mapping[str, Companion]
    done: int  # updates made so far
    history: list[dict[str, Any]] = field(default_factory=list)
    source_losses: SourceLosses = field(default_factory=SourceLosses)
    shortened: ShortenedRows = field(default_factory=ShortenedRows)

    def run(self, evaluators: Mapping[str, Evaluator]) -> TrainResult:
        """The loop, in the order in which it happens."""
        config, engine, began = self.config, self.engine, time.perf_counter()
        for number in range(self.done + 1, config.steps + 1):
            last = number == config.steps
            started = time.perf_counter()
            micro_batches = self.next_step()
            waited = time.perf_counter() - started

            shared = share_counts(micro_batches, engine.device)  # one exchange between processes, before the first forward
            rate = set_learning_rate(self.optimizer, number, config)
            parts = [engine.forward_backward(batch, shared) for batch in shared.padded(micro_batches)]
            norm = clip_gradients(engine.model, config.grad_clip)
            losses = check_losses(parts, norm, micro_batches, shared, config, number)  # the only wait for the device
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            for companion in self.companions.values():
                companion.update(engine.model)
            self.done = number
            self.shortened.add(micro_batches)

            if number % config.log_every == 0 or number == 1 or last:
                seconds = time.perf_counter() - started
                speed = count_tokens(micro_batches) * world_size() / seconds
                rates = {"learning_rate": rate, "grad_norm": losses.pop("grad_norm"), "tokens_per_second": speed}
                by_source = self.source_losses.of_step(parts, micro_batches, shared)
                rows = {**self.shortened.take(), **self.bad_records()}
                self.log({**losses, **rates, "seconds": seconds, "data_wait_seconds": waited, **by_source, **rows})
            if last or (config.evaluate_every and number % config.evaluate_every == 0):
                self.evaluate(evaluators)
            if last or (config.checkpoint_every and number % config.checkpoint_every == 0):
                self.save()
        final = list_checkpoints(self.checkpoints)[-1]
        return TrainResult(self.done, self.history, time.perf_counter() - began, engine.precision, final)

    def next_step(self) -> list[TrainingBatch]:
        micro_batches = next(self.stream, None)
        if micro_batches is None:
            found = f"the data ended after {self.done} steps but {self.config.steps} were asked for ({self.stage})"
            raise TrainingError(f"{found}. Lower steps, or read more epochs.")
        return micro_batches

    def bad_records(self) -> dict[str, int]:
        """How many different rows of each source were skipped so far, if the stream skips."""
        records = getattr(self.stream, "bad_records", None)
        return {} if records is None else {f"bad_records/{source}": count for source, count in records.counts.items()}

    def log(self, row: Mapping[str, Any]) -> None:
        full = {"step": self.done, "stage": self.stage, **row}
        self.history.append(full)
        for tracker in self.trackers:
            tracker.log(full)

    def evaluate(self, evaluators: Mapping[str, Evaluator]) -> None:
        for name, evaluator in evaluators.items():
            with self.engine.evaluation():
                values = evaluator(self.engine.model, self.done)
            self.log({"evaluation": name, **values})

    def save(self) -> None:
        details = {"stage": self.stage, "precision": self.engine.precision}
        save_checkpoint(
            self.checkpoints,
            self.done,
            self.engine.model,
            self.optimizer,
            self.stream,
            companions=self.companions,
            details=details,
            keep=self.config.keep,
        )


def _last_checkpoint(checkpoints: Path, resume: bool) -> Path | None:
    last = next(reversed(list_checkpoints(checkpoints)), None)
    if last is not None and not resume:
        remedy = "Go on with it (metamorph train --resume), or choose another directory (--output-dir)."
        raise CheckpointError(f"a checkpoint at {last.name} but an empty directory was expected ({checkpoints}). {remedy}")
    return last


def _prepare(
    step: StepFunction, model: nn.Module, config: TrainingConfig, device: torch.device, last: Path | None, replicate: Sequence[str]
) -> Engine:
    torch.manual_seed(config.seed + rank())  # dropout and the like; each process its own
    model.to(device)
    # A resumed run keeps its precision: a measurement repeated may come out otherwise.
    precision = read_details(last)["precision"] if last else choose_precision(config.precision, device, model)
    return Engine(step, model, config, device, precision, replicate)


def _restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Stream,
    companions: Mapping[str, Companion],
    last: Path | None,
    start: Path | None,
) -> int:
    """Load what there is to go on from; returns the updates made so far."""
    if companions and world_size() > 1:
        found = f"{sorted(companions)} that follow the weights but {world_size()} processes, over which the weights are split"
        raise ConfigError(f"{found} (train). Train on one process, or without them.")
    if last is not None:
        return load_checkpoint(last, model, optimizer, stream, companions=companions)["step"]
    if start is not None:
        load_weights(start, model)
    return 0


def _open_trackers(run_dir: Path, stage: str, step: int, tracker: Tracker | None, steps: int) -> list[Tracker]:
    """The metrics file, cut after `step`, and the terminal: on the first process only."""
    if rank() != 0:
        return []
    return [MetricsFile(run_dir / "metrics.jsonl", stage=stage, step=step), tracker or TerminalTracker(stage, steps)]
