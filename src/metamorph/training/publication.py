"""What a finished run says on its model's card: data, recipe, steps, versions. `metamorph evaluate` adds results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version

from metamorph.model.card import CardFacts, without_paths
from metamorph.training.config import DataConfig, RunConfig, StageConfig
from metamorph.training.loop import TrainResult


def facts_of_run(config: RunConfig, results: Mapping[str, TrainResult]) -> CardFacts:
    """What is known of a run, also before it has results; paths that lead elsewhere are shortened to their last names."""
    training = {"recipe": f"{config.name}. {config.description}".strip(". ") + "."}
    for number, stage in enumerate(config.stages):
        data = stage.data or config.data
        training[f"stage `{stage.name}`"] = _stage(stage, "packed rows" if data and data.batch_unit == "rows" else "sequences", results)
        if data is not None and (stage.data is not None or number == 0):
            training[f"data from stage `{stage.name}` on" if len(config.stages) > 1 else "data"] = _data(data)
    training["versions"] = ", ".join(f"{name} {version(name)}" for name in ("metamorph", "torch", "transformers"))
    return CardFacts(name=config.name, license=config.license, datasets=config.datasets, training=training)


def _stage(stage: StageConfig, unit: str, results: Mapping[str, TrainResult]) -> str:
    training, result = stage.training, results.get(stage.name)
    trained = "everything" if stage.train is None else ", ".join(stage.train)
    trained += f" but {', '.join(stage.freeze)}" if stage.freeze else ""
    steps = training.steps if result is None else result.step
    weights = f"loss text + {training.visual_loss_weight:g} visual, normalised by {training.normalization} counts"
    rate = f"{training.optimizer}, peak learning rate {training.learning_rate:g} ({training.schedule})"
    precision = "" if result is None else f", {result.precision}"
    return f"{steps} steps of {training.batch_size} {unit}; trains {trained}; {rate}; {weights}{precision}"


def _data(data: DataConfig) -> str:
    sources = []
    for source in data.sources:
        settings = json.dumps(without_paths(source.to_dict()["kwargs"]), ensure_ascii=False)
        often = f"{source.repeats:g} times per epoch" if data.order == "epoch" else f"weight {source.weight:g} of {data.weight_unit}"
        cap = "" if source.max_examples is None else f", at most {source.max_examples} rows"
        sources.append(f"`{source.source}` with `{settings}`, {often}{cap}")
    return "; ".join(sources)
