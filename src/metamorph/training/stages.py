"""Which modules train in a stage.

The paper's stages: 1 trains the projector only, with the visual loss off; 2 trains everything but the vision encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from metamorph.errors import ConfigError
from metamorph.training.config import StageConfig, TrainingConfig, unknown_name

REPLICATED = ("vision_encoder",)
"""Frozen parts that every process keeps whole: not every batch runs them, so they cannot wait for each other."""


def paper_stages(projector: TrainingConfig, joint: TrainingConfig) -> tuple[StageConfig, StageConfig]:
    """The two stages of the paper, with these settings; the visual loss of the first is switched off."""
    return (
        StageConfig(name="projector", train=("projector",), training=projector.model_copy(update={"visual_loss_weight": 0.0})),
        StageConfig(name="vpit", freeze=("vision_encoder",), training=joint),
    )


def select_trainable(model: nn.Module, train: Sequence[str] | None, freeze: Sequence[str] = ()) -> None:
    """Let exactly the parameters of `train` (dotted module names; None = all) without those of `freeze` require a gradient.

    Raises:
        ConfigError: the model has no such module, or nothing is left to train.
    """
    model.requires_grad_(train is None)
    for name in train or ():
        _module(model, name).requires_grad_(True)
    for name in freeze:
        _module(model, name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"train={list(train or ())} and freeze={list(freeze)} but something must be left to train. Name a module to train."
        )


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """For each part of the model: all its parameters, and those that train. A tensor used twice counts where it comes first."""
    seen: set[int] = set()
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            part = name.partition(".")[0]
            total, trained = counts.get(part, (0, 0))
            counts[part] = (total + parameter.numel(), trained + parameter.numel() * parameter.requires_grad)
    return counts


def _module(model: nn.Module, name: str) -> nn.Module:
    module = dict(model.named_modules()).get(name)
    if module is None or not name:
        parent, _, leaf = name.rpartition(".")
        siblings = dict(model.named_modules()).get(parent, model)
        children = [child for child, _ in siblings.named_children()]
        raise ConfigError(unknown_name(leaf, children, f"module of {parent or type(model).__name__}"))
    return module
