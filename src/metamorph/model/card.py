"""The model card: a README.md for the hub, written from what is known. What nobody said is called unknown, and nothing is invented.

A card that `metamorph` wrote has a mark and is written anew when more is known; a card without the mark is somebody's own and stays.

Axes: none; text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import cached_file

from metamorph.provenance import public_name

if TYPE_CHECKING:
    from metamorph.model.configuration import MetaMorphConfig

CARD = "README.md"
MARK = "<!-- Written by metamorph. Without this line the card is yours, and is never written over. -->"
UNKNOWN = "unknown"
TAGS = ("metamorph", "vpit", "any-to-any", "image-text-to-text", "text-to-image")

_BODY = """\
{mark}

# {name}

A [MetaMorph]({paper}): a causal language model that reads images and predicts them, as visual tokens of a vision encoder, in the same
sequence as its text (Visual-Predictive Instruction Tuning). A separate diffusion decoder turns visual tokens into pixels.

| part | from | licence |
|---|---|---|
{parts}

{tokens}

```python
from metamorph import MetaMorphPipeline

pipe = MetaMorphPipeline.from_pretrained("{reference}")
print(pipe("What can you draw?").text)
```

## Training

{training}

## Evaluation

{evaluation}

## Licence

{license}
"""
_PAPER = "https://arxiv.org/abs/2412.14164"


@dataclass(frozen=True)
class CardFacts:
    """What a card can say beyond the model's own settings."""

    name: str | None = None
    license: str | None = None  # of the whole model, as the hub spells it; None: unknown
    datasets: tuple[str, ...] = ()  # names on the hub
    training: Mapping[str, str] = field(default_factory=dict)  # label -> text, in this order
    evaluation: Mapping[str, Any] | None = None  # a report of `metamorph evaluate`


def write_card(directory: str | Path, config: MetaMorphConfig, facts: CardFacts | None = None) -> bool:
    """Write README.md into a directory; without facts only where there is none. A card without our mark always stays.

    Returns:
        Whether it was written.
    """
    path = Path(directory) / CARD
    if path.exists() and (facts is None or not is_ours(path)):
        return False
    path.write_text(str(build_card(config, facts or CardFacts(), Path(directory))), encoding="utf-8")
    return True


def is_ours(path: Path) -> bool:
    """Whether `metamorph` wrote this card, and nobody took the mark out."""
    return MARK in path.read_text(encoding="utf-8", errors="replace")


def build_card(config: MetaMorphConfig, facts: CardFacts, directory: Path) -> ModelCard:
    """The card as text with its metadata."""
    name = facts.name or _title(directory)
    origins = config.origins or {}
    bases = [origin["name"] for origin in origins.values() if _is_hub_name(origin["name"])]
    data = ModelCardData(
        base_model=bases or None,
        base_model_relation="finetune" if bases else None,  # of several base models the hub would say "merge"
        library_name="metamorph",
        pipeline_tag="any-to-any",
        license=facts.license or UNKNOWN,
        datasets=list(facts.datasets) or None,
        tags=list(TAGS),
        model_name=name if facts.evaluation else None,
        eval_results=_results(facts.evaluation) if facts.evaluation else None,
    )
    body = _BODY.format(
        mark=MARK,
        name=name,
        paper=_PAPER,
        reference=name,
        parts="\n".join(_part(label, origins.get(part)) for part, label in (("llm", "language model"), ("vision", "vision encoder"))),
        tokens=_visual_tokens(config),
        training="\n".join(f"- {label}: {text}" for label, text in facts.training.items()) or "Nothing is recorded about its training.",
        evaluation=_evaluation(facts.evaluation) if facts.evaluation else "No results are recorded.",
        license=_license(facts.license),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def add_results(path: Path, report: Mapping[str, Any]) -> bool:
    """Put the results of `metamorph evaluate` on a card that we wrote, in place of earlier ones.

    Returns:
        False if there is no card, or it is somebody's own.
    """
    if not path.is_file() or not is_ours(path):
        return False
    card = ModelCard.load(path)
    title = re.search(r"^# (.+)$", card.text, flags=re.MULTILINE)
    card.data.model_name = title.group(1) if title else path.parent.name
    card.data.eval_results = _results(report)
    text = re.sub(r"(?<=^## Evaluation\n\n).*?(?=\n\n## )", lambda _: _evaluation(report), card.text, flags=re.DOTALL | re.MULTILINE)
    path.write_text(f"---\n{card.data.to_yaml()}\n---\n{text}", encoding="utf-8")
    return True


def origin_of(reference: str | Path) -> dict[str, str]:
    """Where a pretrained part comes from, without naming a place on this machine: its name, and its licence if its own card names one."""
    return {"name": public_name(reference), "license": _license_on_card(reference)}


def without_paths(value: Any) -> Any:
    """Nested settings in which an absolute path is only its last name: a card does not tell where things lay on a machine."""
    if isinstance(value, Mapping):
        return {name: without_paths(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    absolute = isinstance(value, str) and "\n" not in value and Path(value).expanduser().is_absolute()
    return Path(value).name if absolute else value


def _license_on_card(reference: str | Path) -> str:
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        file = cached_file(str(reference), CARD, _raise_exceptions_for_gated_repo=False, **quiet)
        data = None if file is None else ModelCard.load(file, ignore_metadata_errors=True).data
    except (OSError, ValueError):  # no such repository, or metadata that does not read: the licence is not known
        return UNKNOWN
    found = getattr(data, "license", None)
    if found == "other":  # then its name is told beside it
        found = getattr(data, "license_name", None) or found
    return found if isinstance(found, str) else UNKNOWN


def _is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _title(directory: Path) -> str:
    place = directory.resolve()
    return place.parent.name if place.name == "model" else place.name  # a run saves as runs/my-run/model


def _part(label: str, origin: Mapping[str, str] | None) -> str:
    if origin is None:
        return f"| {label} | {UNKNOWN} | {UNKNOWN} |"
    name = origin["name"]
    shown = f"[{name}](https://huggingface.co/{name})" if _is_hub_name(name) else f"a local directory, `{name.removeprefix('./')}`"
    return f"| {label} | {shown} | {origin['license']} |"


def _visual_tokens(config: MetaMorphConfig) -> str:
    normalised = "of norm 1" if config.normalize_visual_tokens else "not normalised"
    return (
        f"An image is {config.num_visual_tokens} visual tokens: states of the encoder (layer {config.vision_feature_layer}), pooled "
        f"({config.pooling}), {normalised}. Projector: {config.projector_type}; vision head: {config.vision_head_type}; visual loss: "
        f"{config.visual_loss}, weight {config.visual_loss_weight:g}."
    )


def _license(license: str | None) -> str:
    if license is not None:
        return f"{license}. The licences of the parts above hold as well."
    return "Unknown: none was given. The licences of the parts above hold in any case."


def _headline(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: metric for name, metric in report["metrics"].items() if "/" not in name}  # not those of single kinds


def _results(report: Mapping[str, Any]) -> list[EvalResult]:
    dataset, protocol = report.get("dataset", UNKNOWN), dict(report.get("protocol", {}))
    return [
        EvalResult(
            task_type="any-to-any",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_args=protocol or None,
            metric_type=name,
            metric_name=name,
            metric_value=round(metric["value"], 4),
            metric_args={key: round(metric[key], 4) for key in ("low", "high", "n") if key in metric} or None,
        )
        for name, metric in _headline(report).items()
    ]


def _evaluation(report: Mapping[str, Any]) -> str:
    rows = ["| metric | value | 95% interval | n |", "|---|---|---|---|"]
    for name, metric in _headline(report).items():
        interval = f"{metric['low']:.3f} to {metric['high']:.3f}" if {"low", "high"} <= metric.keys() else UNKNOWN
        rows.append(f"| {name} | {metric['value']:.3f} | {interval} | {metric.get('n', UNKNOWN)} |")
    told = {"data": report.get("dataset", UNKNOWN), "command": report.get("command", UNKNOWN), "protocol": report.get("protocol", UNKNOWN)}
    told["versions"] = report.get("versions", UNKNOWN)
    lines = [f"- {label}: {value if isinstance(value, str) else f'`{json.dumps(value)}`'}" for label, value in told.items()]
    return "\n".join([*rows, "", *lines])
