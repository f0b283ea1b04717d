"""What a run would do, computed without doing it: parameters, tokens, steps, rates, memory.

Axes in formulas: t positions per forward pass, d LLM width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from metamorph.training.config import DataConfig, RunConfig, StageConfig, TrainingConfig
from metamorph.training.optim import learning_rate_factor
from metamorph.training.stages import REPLICATED, count_parameters, select_trainable

BYTES_PER_WEIGHT = 4
"""Weights are kept in float32, whatever the precision of products."""
BYTES_PER_TRAINED_WEIGHT = 12
"""Beside a trained weight stand its gradient and AdamW's two moments; Muon keeps one, and needs at most about 1 GB to work in."""
ACTIVATION_BYTES = 34
"""Kept per position, width and layer for the backward pass, in 16 bits: the estimate for a transformer layer of Korthikanti et al. 2022
(arXiv 2205.05198), without attention scores. Float32 doubles it; gradient checkpointing keeps 2."""


@dataclass(frozen=True)
class StagePlan:
    """One stage."""

    name: str
    parameters: dict[str, tuple[int, int]]
    """Part -> all parameters, those that train."""
    steps: int | None
    """None = known only once the data is there."""
    sequences_per_step: int
    """Packed rows, where the data settings count those."""
    micro_batches: int
    tokens_per_step: int
    """At most, on all processes: every row as long as allowed."""
    learning_rates: tuple[tuple[int, float], ...]
    """(step, rate) at the first step, the peak, half time and the end."""
    memory_bytes: int
    """Of one process, at most: weights, gradients, moments and the activations of one forward pass."""


def plan(config: RunConfig, model: nn.Module, processes: int = 1) -> list[StagePlan]:
    """Plan every stage; the model may be on the meta device.

    Raises:
        ConfigError: a stage names a module that the model does not have.
    """
    plans = []
    for stage in config.stages:
        select_trainable(model, stage.train, stage.freeze)
        plans.append(_plan_stage(stage, stage.data or config.data, model, processes))
    return plans


def _plan_stage(stage: StageConfig, data: DataConfig | None, model: nn.Module, processes: int) -> StagePlan:
    training = stage.training
    share = -(-training.batch_size // processes)
    micro = min(training.micro_batch_size or share, share)
    length = data.max_length if data is not None else 0
    parameters = count_parameters(model)
    weights = {name: total * BYTES_PER_WEIGHT for name, (total, _) in parameters.items()}
    whole = sum(weights.pop(name, 0) for name in REPLICATED)
    trained = sum(trained for _, trained in parameters.values()) * BYTES_PER_TRAINED_WEIGHT
    activations = _activation_bytes(training, getattr(model, "config", None), micro * length)
    return StagePlan(
        name=stage.name,
        parameters=parameters,
        steps=training.steps or None,
        sequences_per_step=training.batch_size,
        micro_batches=-(-share // micro),
        tokens_per_step=training.batch_size * length,
        learning_rates=_rates(training),
        memory_bytes=(sum(weights.values()) + trained) // processes + whole + activations,
    )


def _activation_bytes(training: TrainingConfig, settings: Any, positions: int) -> int:
    text = getattr(settings, "text_config", None)
    if text is None:
        return 0
    per_position = 2 if training.gradient_checkpointing else ACTIVATION_BYTES
    factor = 2 if training.precision == "float32" and not training.gradient_checkpointing else 1
    return positions * text.hidden_size * text.num_hidden_layers * per_position * factor


def _rates(training: TrainingConfig) -> tuple[tuple[int, float], ...]:
    if not training.steps:
        return ((0, training.learning_rate),)
    marks = sorted({1, max(training.warmup_steps, 1), max(training.steps // 2, 1), training.steps})
    return tuple((step, training.learning_rate * learning_rate_factor(step, training)) for step in marks)
