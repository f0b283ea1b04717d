"""The shape of the model that a recipe trains, without its weights: of a directory's config, or those in `configs/`, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from metamorph.errors import CheckpointError
from metamorph.places import CONFIG, check_source
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

    encoder = _load(MetaMorphConfig, config.encoder)
    known = _known(config.base)
    if known is None:
        return start_decoder(config, encoder, weights=False)
    with TemporaryDirectory() as place:  # laid out as a saved diffusion model, but with configs only
        _lay_out(known, Path(place))
        return start_decoder(config.model_copy(update={"base": place}), encoder, weights=False)


def _nested(reference: str | None) -> Any:
    from transformers import AutoConfig

    known = _known(reference)
    return dict(known) if known is not None else _load(AutoConfig, str(reference))


def _known(reference: str | None) -> dict[str, Any] | None:
    """The config of a model whose shape comes with the package."""
    shapes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(CONFIGS.glob("*.json"))]
    return next((shape["config"] for shape in shapes if shape["source"] == reference), None)


def _lay_out(parts: dict[str, Any], place: Path) -> None:
    """Write the configs of a diffusion model as diffusers does: model_index.json, and a folder for each part."""
    for name, settings in parts.items():
        (place / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (place / name / file).write_text(json.dumps(settings), encoding="utf-8")
    index = {name: ["diffusers", settings["_class_name"]] for name, settings in parts.items()}
    (place / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline", **index}), encoding="utf-8")


def _load(kind: Any, reference: str) -> Any:
    check_source(reference, "a model's config", index=CONFIG)
    try:
        return kind.from_pretrained(reference)
    except (OSError, ValueError) as error:
        remedy = "Give a directory that holds the model, or build the parts first."
        raise CheckpointError(f"no readable config but the shape of the model is needed ({reference}): {error}. {remedy}") from error
