"""Recipes: functions that return a run configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from metamorph.errors import ConfigError
from metamorph.recipes.decoder import sd15_decoder
from metamorph.recipes.metamorph import metamorph_llama3_1_8b
from metamorph.recipes.microworld import microworld, microworld_decoder, microworld_demo
from metamorph.training.config import RunConfig, unknown_name

__all__ = ["RECIPES", "load_recipe", "metamorph_llama3_1_8b", "microworld", "microworld_decoder", "microworld_demo", "sd15_decoder"]

RECIPES: tuple[Callable[[], RunConfig], ...] = (microworld_demo, microworld, microworld_decoder, metamorph_llama3_1_8b, sd15_decoder)
"""What `metamorph train --list` shows."""


def load_recipe(name: str) -> RunConfig:
    """A recipe by the name of its function, or a YAML file with the fields of RunConfig.

    Raises:
        ConfigError: there is neither; with the nearest name.
    """
    if name.endswith((".yaml", ".yml")):
        return RunConfig.load(Path(name))
    found = next((recipe for recipe in RECIPES if recipe.__name__ == name.replace("-", "_")), None)
    if found is None:
        raise ConfigError(f"{unknown_name(name, [recipe.__name__ for recipe in RECIPES], 'recipe')} (metamorph train)")
    return found()
