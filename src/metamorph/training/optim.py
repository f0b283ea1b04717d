"""The optimizer and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from metamorph.errors import ConfigError
from metamorph.training.config import TrainingConfig
from metamorph.training.device import world_size
from metamorph.training.muon import Muon, hidden_matrices


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Share of the peak learning rate for the update number `step`, counted from 1.

    Warm-up is linear, or logarithmic: log(1 + step) / log(1 + warm-up steps). Then cosine or linear down to `min_learning_rate_ratio`
    at the last step, or constant.
    """
    warmup = config.warmup_steps
    if step <= warmup:
        return math.log1p(step) / math.log1p(warmup) if config.warmup == "logarithmic" else step / warmup
    progress = (step - warmup) / max(config.steps - warmup, 1)
    floor = config.min_learning_rate_ratio
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "linear":
        return floor + (1 - floor) * (1 - progress)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def check_optimizer(config: TrainingConfig) -> None:
    """Refuse Muon over several processes: call it before a model is split.

    Raises:
        ConfigError: the optimizer needs whole matrices, and there are several processes.
    """
    if config.optimizer == "muon" and world_size() > 1:
        found = f"optimizer='muon' and {world_size()} processes, over which matrices are split"
        remedy = "Train on one process, or set optimizer=adamw (--set stages.1.training.optimizer=adamw) and tune the learning rate."
        raise ConfigError(f"{found} but Muon needs them whole (optimizer). {remedy}")


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """The optimizer of the settings over what requires a gradient. Vectors and scalars (norms, biases) are never decayed.

    Raises:
        ConfigError: nothing is trainable, `learning_rate_scale` names no trainable parameter, or Muon over several processes.
    """
    check_optimizer(config)
    orthogonal = hidden_matrices(model) if config.optimizer == "muon" else set()
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    unused = set(config.learning_rate_scale)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matching = [key for key in config.learning_rate_scale if name == key or name.startswith(key + ".")]
        unused -= set(matching)
        scale = config.learning_rate_scale[max(matching, key=len)] if matching else 1.0  # the most specific name wins
        groups.setdefault((parameter.ndim >= 2, scale, parameter in orthogonal), []).append(parameter)
    if not groups:
        raise ConfigError("0 trainable parameters but at least 1 is needed (optimizer). Let the stage train a module.")
    if unused:
        raise ConfigError(f"learning_rate_scale for {sorted(unused)} but no trainable parameter has such a name. Use dotted module names.")
    fused = next(iter(groups.values()))[0].device.type in ("cpu", "cuda", "mps")
    parameter_groups = [
        {"params": parameters, "weight_decay": config.weight_decay if decayed else 0.0, "scale": scale, "orthogonal": matrix}
        for (decayed, scale, matrix), parameters in groups.items()
    ]
    kind = Muon if config.optimizer == "muon" else torch.optim.AdamW
    return kind(parameter_groups, lr=config.learning_rate, betas=config.betas, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: TrainingConfig) -> float:
    """Set the rate of the update number `step` (from 1) in every group; returns it for a scale of 1."""
    rate = config.learning_rate * learning_rate_factor(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    return rate
