"""A whole run: build, train stage after stage, save. Everything lands in the run directory.

<run_dir>/
    config.yaml     the resolved settings
    metrics.jsonl   a row per logged step, all stages
    bad_records.jsonl   rows that were skipped, if that is allowed and there are any
    checkpoints/<stage>/step-.../
    run.json        versions, device, and how each stage went
    model/          the trained model with its processor and its card, or the decoder
"""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from metamorph.errors import ConfigError
from metamorph.model.card import build_card, write_card
from metamorph.model.vision_encoder import AbsentEncoder
from metamorph.places import check_target
from metamorph.training.assembly import (
    build_cache,
    build_decoder,
    build_decoder_stream,
    build_encoder,
    build_mixture,
    build_model,
    build_stream,
    resolve_steps,
    vpit_step,
)
from metamorph.training.checkpoint import list_checkpoints, read_details
from metamorph.training.config import RunConfig, StageConfig
from metamorph.training.device import pick_device, processes, rank, world_size
from metamorph.training.encoding import encoder_of
from metamorph.training.loop import TrainResult, train
from metamorph.training.publication import facts_of_run
from metamorph.training.stages import REPLICATED, select_trainable
from metamorph.training.trackers import Tracker

RunEvaluator = Callable[[Any, Any, int], Mapping[str, Any]]
"""Model, processor, number of updates -> numbers to log."""


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    run_dir: Path
    model_dir: Path
    stages: dict[str, TrainResult]
    seconds: float


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    evaluators: Mapping[str, RunEvaluator] | None = None,
    on_stage: Callable[[str, Any, Any], None] | None = None,
    tracker: Callable[[StageConfig], Tracker] | None = None,
) -> RunResult:
    """Train as the settings say, and save the result in `run_dir/model`.

    Each stage starts from the checkpoint that the one before left, so that a run can be resumed anywhere, also between stages.

    Args:
        config: the run.
        resume: go on where an earlier process with the same settings stopped.
        evaluators: by name, called in every stage as its `evaluate_every` says; rows of metrics.
        on_stage: called with "start" before the first stage and with its name after each, the model (in evaluation mode) and processor.
        tracker: shows a stage's progress; None = the terminal.

    Raises:
        ConfigError: settings that cannot be, or other ones than those of the run to resume; a directory that cannot be written; no
            such device.
        CheckpointError: a part is missing, or the directory holds a run and `resume` is off.
        TrainingError: see `train`.
    """
    began = time.perf_counter()
    check_target(config.run_dir, "output_dir", directory=True)
    device, *_ = (pick_device(stage.training.device) for stage in config.stages)  # all of them, before the first one trains
    with processes(device):
        _keep_settings(config, resume)
        results: dict[str, TrainResult] = {}
        body = _run_decoder if config.decoder is not None else _run_model
        body(config, results, partial(train, run_dir=config.run_dir, resume=resume), evaluators or {}, on_stage, tracker)
        if rank() == 0:
            _write_summary(config, results)
    return RunResult(config.run_dir, config.run_dir / "model", results, time.perf_counter() - began)


def last_checkpoint(config: RunConfig) -> tuple[str, int] | None:
    """Stage and step of the last complete checkpoint in the run's directory, from which it goes on when it is resumed."""
    for stage in reversed(config.stages):
        if found := list_checkpoints(config.run_dir / "checkpoints" / stage.name):
            return stage.name, read_details(found[-1])["step"]
    return None


def _run_model(config, results, train_stage, evaluators, on_stage, tracker) -> None:
    assert config.model is not None
    start = None
    for number, stage in enumerate(config.stages):
        # A fresh model each time: which parameters train is fixed once they are split over processes.
        data = stage.data or config.data
        model, processor = build_model(config.model, config.stages[0].training.seed, with_encoder=data.encoded is None)
        if number == 0 and on_stage is not None:
            on_stage("start", model.eval(), processor)
        if number == 0:
            _try_card(model, config)
        select_trainable(model, stage.train, stage.freeze)
        mixture = build_mixture(data, stage.training.seed, build_encoder(data, processor))
        training = resolve_steps(stage.training, mixture)
        cache = build_cache(data, model, config.model)
        stream = build_stream(data, training, mixture, processor, cache, run_dir=config.run_dir, stage=stage.name)
        bound = {name: partial(_evaluate, evaluator, processor) for name, evaluator in evaluators.items()}
        try:
            result = train_stage(
                partial(vpit_step, drawn_token_dropout=training.drawn_token_dropout),
                model,
                stream,
                training,
                stage=stage.name,
                evaluators=bound,
                tracker=tracker(stage.model_copy(update={"training": training})) if tracker else None,
                start=start,
                replicate=REPLICATED,
            )
        finally:
            stream.close()
        results[stage.name], start = result, result.checkpoint
        if on_stage is not None:
            on_stage(stage.name, model.eval(), processor)
        if number == len(config.stages) - 1:
            _save_model(model, processor, config, results)
        del model, stream, bound
        gc.collect()


def _run_decoder(config, results, train_stage, evaluators, on_stage, tracker) -> None:
    from metamorph.decoder import VisualDecoderPipeline, WeightAverage, decoder_step

    start, seed = None, config.stages[0].training.seed
    for number, stage in enumerate(config.stages):
        model, encoder = build_decoder(config.decoder, seed)
        if number == 0 and on_stage is not None:
            on_stage("start", model.eval(), encoder.model)
        select_trainable(model, stage.train, stage.freeze)
        encoder.model.vision_encoder.to(pick_device(stage.training.device))  # its language model stays where it is: nothing asks it
        companions = {"ema": WeightAverage(model, config.decoder.ema_decay)} if config.decoder.ema_decay else {}
        result = train_stage(
            decoder_step,
            model,
            build_decoder_stream(config.decoder, stage.training, encoder),
            stage.training,
            stage=stage.name,
            evaluators={name: partial(_evaluate, evaluator, encoder.model) for name, evaluator in evaluators.items()},
            tracker=tracker(stage) if tracker else None,
            companions=companions,
            start=start,
        )
        results[stage.name], start = result, result.checkpoint
        for average in companions.values():
            average.copy_to(model)
        if on_stage is not None:
            on_stage(stage.name, model.eval(), encoder.model)
        if number == len(config.stages) - 1:
            whole = _whole_state(model)
            if rank() == 0:
                if world_size() > 1:
                    model, _ = build_decoder(config.decoder, seed)
                    model.load_state_dict(whole)
                VisualDecoderPipeline.from_model(model).save_pretrained(config.run_dir / "model")


def _evaluate(evaluator: RunEvaluator, companion: Any, model: nn.Module, step: int) -> Mapping[str, Any]:
    return evaluator(model, companion, step)


def _save_model(model: Any, processor: Any, config: RunConfig, results: Mapping[str, TrainResult]) -> None:
    directory, whole = config.run_dir / "model", _whole_state(model)
    if rank() == 0:
        if isinstance(model.vision_encoder.encoder, AbsentEncoder):  # it was not needed to train; a saved model is whole
            assert config.model is not None
            model.vision_encoder = encoder_of(config.model).load()
            whole |= {f"vision_encoder.{name}": value for name, value in model.vision_encoder.state_dict().items()}
        model.eval()
        model.save_pretrained(directory, state_dict=whole) if world_size() > 1 else model.save_pretrained(directory)
        processor.save_pretrained(directory)
        write_card(directory, model.config, facts_of_run(config, results), base=model.origin(directory))


def _try_card(model: Any, config: RunConfig) -> None:
    """What a card cannot be made of fails now, and not after the training."""
    build_card(model.config, facts_of_run(config, {}), config.run_dir)


def _whole_state(model: nn.Module) -> dict[str, Any]:
    """All weights on the first process, whatever they are split over; nothing is moved on a single process."""
    if world_size() == 1:
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _keep_settings(config: RunConfig, resume: bool) -> None:
    """Write config.yaml, or on resume compare with it.

    Raises:
        ConfigError: the run to resume had other settings.
    """
    path = config.run_dir / "config.yaml"
    if resume and path.is_file():
        before, now = _flatten(RunConfig.load(path).to_dict()), _flatten(config.to_dict())
        changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name) and name != "output_dir"]
        if changed:
            name = changed[0]
            found = f"{name}={now.get(name)!r} ({len(changed)} settings differ) but the run to resume had {before.get(name)!r}"
            raise ConfigError(f"{found} ({path}). Resume with `metamorph train {path} --resume`, or choose another output_dir.")
    elif rank() == 0:
        config.save(path)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    return {name: leaf for key, inner in items for name, leaf in _flatten(inner, f"{prefix}.{key}" if prefix else str(key)).items()}


def _write_summary(config: RunConfig, results: Mapping[str, TrainResult]) -> None:
    stages = {}
    for name, result in results.items():
        rows = [row for row in result.history if "evaluation" not in row]
        last = {key: value for key, value in (rows[-1] if rows else {}).items() if key.endswith("loss")}
        stages[name] = {"steps": result.step, "seconds": round(result.seconds, 1), "precision": result.precision, **last}
    versions = {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()}
    summary = {
        "name": config.name,
        "stages": stages,
        "device": str(pick_device(config.stages[0].training.device)),
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
    (config.run_dir / "run.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
