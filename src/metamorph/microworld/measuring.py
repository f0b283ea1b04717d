"""The table of results of a saved model: what `metamorph evaluate` runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metamorph.evaluation.runner import evaluate
from metamorph.microworld.cards import hash_weights
from metamorph.microworld.report import results_report
from metamorph.microworld.subject import Subject
from metamorph.microworld.suite import evaluation_tasks
from metamorph.pipeline import MetaMorphPipeline
from metamorph.places import CONFIG, DECODER_INDEX, check_source, check_target


@dataclass(frozen=True)
class Measured:
    """Directories of what is measured: the model, its decoder, and the language model as it was before VPiT."""

    model: Path
    decoder: Path
    llm: Path


def measure(
    measured: Measured,
    *,
    samples: int | None = None,
    seed: int = 0,
    device: str | None = None,
    output: Path | None = None,
    told: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run all tasks with the shipped model's numbers of samples (or `samples` each), and write the report.

    Raises:
        CheckpointError: a directory is missing or incomplete.
        ConfigError: the report cannot be written, or there is no such device.
    """
    if output is not None:
        check_target(output, "output")
    for place, what, index in (
        (measured.model, "a MetaMorph checkpoint", CONFIG),
        (measured.decoder, "a decoder", DECODER_INDEX),
        (measured.llm, "a causal LM", CONFIG),
    ):
        check_source(place, what, index=index, hub=False)
    began = time.perf_counter()
    pipeline = MetaMorphPipeline.from_pretrained(measured.model, measured.decoder, device=device)
    tasks = evaluation_tasks(full=True)
    override = {task.name: samples for task in tasks} if samples is not None else None
    results = evaluate(tasks, Subject(pipeline, measured.llm), seed=seed, samples=override, told=told)
    report = results_report(results, "shipped", seed, {"evaluation": time.perf_counter() - began})
    report["sha256"] = {name: hash_weights(Path(path)) for name, path in asdict(measured).items()}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report
