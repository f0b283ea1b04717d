"""The shape of the model that a recipe trains, without its weights: of a directory's config, or those in `configs/`, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metamorph.errors import CheckpointError
from metamorph.training.assembly import start_decoder
from metamorph.training.config import DecoderConfig, ModelConfig

if TYPE_CHECKING:
    from metamorph.decoder import DecoderModel
    from metamorph.model.modeling import MetaMorph

CONFIGS = Path(__file__).parent / "configs"


def empty_model(config: ModelConfig) -> MetaMorph:
    """A model of the right shape on the meta device; no weights are read.

    Raises:
        CheckpointError: a config is neither in the directory, nor in the hub's cache, nor among the shapes that come with the package.
    """
    from metamorph.model.configuration import MetaMorphConfig
    from metamorph.model.conversion import CONFIG_CHOICES
    from metamorph.model.modeling import MetaMorph

    if config.start is not None:
        settings = _load(MetaMorphConfig, config.start)
    else:
        choices = {name: value for name, value in config.overrides.items() if name in CONFIG_CHOICES}
        settings = MetaMorphConfig(text_config=_nested(config.llm), vision_config=_nested(config.vision), **choices)
    with torch.device("meta"):
        return MetaMorph(settings)


def empty_decoder(config: DecoderConfig) -> DecoderModel:
    """A decoder of the right shape on the meta device; of its base and encoder only the configs are read.

    Raises:
        CheckpointError: a config is missing.
        ConfigError: a setting is unknown, or the parts do not fit together.
    """
    from metamorph.model.configuration import MetaMorphConfig

    return start_decoder(config, _load(MetaMorphConfig, config.encoder), weights=False)


def _nested(reference: str | None) -> Any:
    from transformers import AutoConfig

    shapes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(CONFIGS.glob("*.json"))]
    known = next((shape["config"] for shape in shapes if shape["source"] == reference), None)
    return dict(known) if known is not None else _load(AutoConfig, str(reference))


def _load(kind: Any, reference: str) -> Any:
    try:
        return kind.from_pretrained(reference)
    except (OSError, ValueError) as error:
        remedy = "Give a directory that holds the model, or build the parts first."
        raise CheckpointError(f"no readable config but the shape of the model is needed ({reference}): {error}. {remedy}") from error
