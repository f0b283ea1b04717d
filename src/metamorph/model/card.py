"""The model card: a README.md for the hub, written from what is known. What nobody said is called unknown, and nothing is invented.

A card that `metamorph` wrote has a mark and is written anew when more is known; a card without the mark is somebody's own and stays. What a
card of ours tells about training and results holds for certain weights only, whose hash stands on it: beside others it is taken out.

Axes: none; text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import cached_file

from metamorph.model.weight_files import weights_digest
from metamorph.provenance import public_name

if TYPE_CHECKING:
    from metamorph.model.configuration import MetaMorphConfig

CARD = "README.md"
MARK = "<!-- Written by metamorph. Without this line the card is yours, and is never written over. -->"
UNKNOWN = "unknown"
NO_TRAINING = "Nothing is recorded about its training."
NO_RESULTS = "No results are recorded."
_WEIGHTS = "<!-- Training and results are those of the weights with sha256 {digest} -->"
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
    base: Mapping[str, str] | None = None  # the model from whose weights it started, as `origin_of` says


def write_card(
    directory: str | Path, config: MetaMorphConfig, facts: CardFacts | None = None, *, base: Mapping[str, str] | None = None
) -> bool:
    """Write README.md into a directory, beside the weights. A card without our mark always stays.

    Without facts it is written only where there is none, or one of ours about other weights. With facts, results that are already on
    the card stay, if the weights are still the same. `base`: see `CardFacts`.

    Returns:
        Whether it was written.
    """
    path, kept = Path(directory) / CARD, None
    if path.exists():
        if not is_ours(path):
            return False
        if holds_for(path, path.parent):
            if facts is None:
                return False
            kept = _read(path)
    facts = replace(facts or CardFacts(), **({} if base is None else {"base": base}))
    card = build_card(config, facts, path.parent)
    if kept is not None and kept.data.eval_results and facts.evaluation is None:
        card = _with_results(card, kept.data.model_name or UNKNOWN, kept.data.eval_results, _section(kept.text, "Evaluation"))
        card = ModelCard(_about(str(card), weights_digest(path.parent)))
    path.write_text(str(card), encoding="utf-8")
    return True


def claims_nothing(path: Path) -> bool:
    """Whether this card of ours is silent about training and results."""
    text = path.read_text(encoding="utf-8")
    return NO_TRAINING in text and NO_RESULTS in text


def holds_for(path: Path, directory: Path) -> bool:
    """Whether a card of ours says nothing that holds for other weights than those in a directory."""
    if claims_nothing(path):
        return True
    found = digest_on(path)
    return found is not None and found == weights_digest(directory)


def digest_on(path: Path) -> str | None:
    """The hash of the weights that this card is about, if it names one."""
    found = re.search(re.escape(_WEIGHTS).replace(r"\{digest\}", "([0-9a-f]{64})"), path.read_text(encoding="utf-8", errors="replace"))
    return found.group(1) if found else None


def is_ours(path: Path) -> bool:
    """Whether `metamorph` wrote this card, and nobody took the mark out."""
    return MARK in path.read_text(encoding="utf-8", errors="replace")


def build_card(config: MetaMorphConfig, facts: CardFacts, directory: Path) -> ModelCard:
    """The card as text with its metadata."""
    name = facts.name or _title(directory)
    origins = config.origins or {}
    rows = [("started as", facts.base)] if facts.base else []
    rows += [(label, origins.get(part)) for part, label in (("llm", "language model"), ("vision", "vision encoder"))]
    nearest = [facts.base] if facts.base else list(origins.values())
    bases = [origin["name"] for origin in nearest if is_hub_name(origin["name"])]
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
        parts="\n".join(_part(label, origin) for label, origin in rows),
        tokens=_visual_tokens(config),
        training="\n".join(f"- {label}: {text}" for label, text in facts.training.items()) or NO_TRAINING,
        evaluation=_evaluation(facts.evaluation) if facts.evaluation else NO_RESULTS,
        license=_license(facts.license),
    )
    digest = weights_digest(directory) if facts.training or facts.evaluation else None
    return ModelCard(_about(f"---\n{data.to_yaml()}\n---\n\n{body}", digest))


def add_results(path: Path, report: Mapping[str, Any]) -> bool:
    """Put the results of `metamorph evaluate` on a card that we wrote, in place of earlier ones.

    Returns:
        False if there is no card, it is somebody's own, or its metadata cannot be read.
    """
    card = _read(path) if path.is_file() and is_ours(path) else None
    if card is None:
        return False
    title = re.search(r"^# (.+)$", card.text, flags=re.MULTILINE)
    digest, before = weights_digest(path.parent), digest_on(path)
    card = _with_results(card, title.group(1) if title else path.parent.name, _results(report), _evaluation(report))
    text = str(card) if before in (None, digest) else _with_section(str(card), "Training", NO_TRAINING)
    path.write_text(_about(text, digest), encoding="utf-8")
    return True


def _read(path: Path) -> ModelCard | None:
    try:
        return ModelCard.load(path)
    except (yaml.YAMLError, ValueError):  # somebody changed the metadata, to something that does not read
        return None


def _with_results(card: ModelCard, name: str, results: list[EvalResult], section: str) -> ModelCard:
    card.data.model_name, card.data.eval_results = name, results
    return ModelCard(f"---\n{card.data.to_yaml()}\n---\n{_with_section(card.text, 'Evaluation', section)}")


def _section(text: str, title: str) -> str:
    found = re.search(rf"(?<=^## {title}\n\n).*?(?=\n\n## )", text, flags=re.DOTALL | re.MULTILINE)
    return found.group() if found else ""


def _with_section(text: str, title: str, content: str) -> str:
    return re.sub(rf"(?<=^## {title}\n\n).*?(?=\n\n## )", lambda _: content, text, flags=re.DOTALL | re.MULTILINE)


def _about(text: str, digest: str | None) -> str:
    """The card with the hash of the weights it is about, after the mark."""
    text = re.sub("\n" + re.escape(_WEIGHTS).replace(r"\{digest\}", "[0-9a-f]{64}"), "", text)
    return text if digest is None else text.replace(MARK, f"{MARK}\n{_WEIGHTS.format(digest=digest)}", 1)


def origin_of(reference: str | Path, *, ask_hub: bool = True) -> dict[str, str]:
    """Where a pretrained part comes from, without naming a place on this machine: its name, and its licence if its own card names one.

    With `ask_hub=False` only cards that are on this machine are read.
    """
    return {"name": public_name(reference), "license": _license_on_card(reference, ask_hub)}


def without_paths(value: Any) -> Any:
    """Nested settings in which a path that leads elsewhere is only its last name: a card does not tell where things lay on a machine.

    That is an absolute path, one in somebody's home (`~/`), a `file:` address, and a relative one with `..` in it.
    """
    if isinstance(value, Mapping):
        return {name: without_paths(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    return PureWindowsPath(value).name if isinstance(value, str) and _leads_elsewhere(value) else value


def _leads_elsewhere(text: str) -> bool:
    if "\n" in text:
        return False
    place = PureWindowsPath(text)  # parts of both kinds of path
    return place.root != "" or text.startswith("file:") or ".." in place.parts or re.match(r"~\w*[/\\]", text) is not None


def _license_on_card(reference: str | Path, ask_hub: bool) -> str:
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        file = cached_file(str(reference), CARD, local_files_only=not ask_hub, _raise_exceptions_for_gated_repo=False, **quiet)
        data = None if file is None else ModelCard.load(file, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):  # no such repository, or metadata that does not read: the licence is not known
        return UNKNOWN
    found = getattr(data, "license", None)
    if found == "other":  # then its name is told beside it
        found = getattr(data, "license_name", None) or found
    return found if isinstance(found, str) else UNKNOWN


def is_hub_name(name: str) -> bool:
    """Whether a repository could be called so."""
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
    shown = f"[{name}](https://huggingface.co/{name})" if is_hub_name(name) else f"a local directory, `{name.removeprefix('./')}`"
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
    command = re.sub(r"[^\s=]+", lambda word: without_paths(word.group()), report.get("command", UNKNOWN))
    told = {"data": report.get("dataset", UNKNOWN), "command": command, "protocol": report.get("protocol", UNKNOWN)}
    told["versions"] = report.get("versions", UNKNOWN)
    lines = [f"- {label}: {value if isinstance(value, str) else f'`{json.dumps(value)}`'}" for label, value in told.items()]
    return "\n".join([*rows, "", *lines])
