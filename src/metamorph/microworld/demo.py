"""The demo: from shipped parts to a model that sees and draws, measured before, between and after its stages, and shown.

Training goes through `training.run`, so that an interrupted demo goes on where it stopped. An evaluation that was
finished is kept in the run directory and not made again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metamorph.errors import ConfigError
from metamorph.evaluation.metrics import Metric
from metamorph.evaluation.runner import Results, evaluate
from metamorph.microworld.cards import hash_weights
from metamorph.microworld.report import MOMENTS, demo_page, demo_report
from metamorph.microworld.report_curves import read_band
from metamorph.microworld.report_samples import sample_blocks
from metamorph.microworld.subject import DENOISING_STEPS, Subject
from metamorph.microworld.suite import MODEL_FREE, combine, evaluation_tasks
from metamorph.model.card import CARD, add_results
from metamorph.pipeline import MetaMorphPipeline
from metamorph.reporting.page import write
from metamorph.training.config import RunConfig, StageConfig
from metamorph.training.run import run
from metamorph.training.trackers import Tracker, read_metrics

if TYPE_CHECKING:
    from metamorph.decoder import VisualDecoderPipeline

Told = Callable[[str], None]
REPORT, PAGE = "report.json", "report.html"
_LEFT_BEHIND = ("checkpoints", "evaluations", "model", "metrics.jsonl", "config.yaml", "run.json", REPORT, PAGE)
_NEXT = """\
# ask the model that was just trained
metamorph generate "a small red star at the top left on night" --model {model} -o star.png
metamorph generate "What colour is the star?" --image star.png --model {model}
# the shipped model: the same recipe, trained longer
metamorph generate "a large blue heart at the bottom right on sand" -o heart.png
metamorph evaluate
# look at the data, and train with other settings
metamorph microworld show
metamorph train --list
metamorph train microworld_demo --set stages.1.training.steps=2400 --set output_dir=runs/longer"""


@dataclass(frozen=True)
class Demo:
    """What a demo run is made of.

    `samples` overrides the numbers of samples by task (at every moment), `few` shows fewer pictures; both are for tests.
    """

    config: RunConfig
    decoder: Path
    seed: int = 0
    samples: Mapping[str, int] = field(default_factory=dict)
    few: bool = False
    steps: int = DENOISING_STEPS


@dataclass(frozen=True)
class Outcome:
    """Where the results are, and the report's values."""

    report: dict[str, Any]
    json: Path
    page: Path
    next_steps: str


def run_demo(demo: Demo, *, told: Told | None = None, tracker: Callable[[StageConfig], Tracker] | None = None) -> Outcome:
    """Train as `demo.config` says, evaluate at step 0 and after each stage, and write report.json and report.html.

    Raises:
        ConfigError: the run directory holds a run with other settings, or the recipe does not join an LLM and an encoder.
        ComponentError, CheckpointError: a part is missing.
        TrainingError: see `train`.
    """
    tell, began = told or (lambda line: None), time.perf_counter()
    config = demo.config
    if config.model is None or config.model.llm is None:
        raise ConfigError(f"recipe {config.name!r} without an llm but the demo starts from one. Set model.llm and model.vision.")
    directory, resumed = config.run_dir, (config.run_dir / "config.yaml").is_file()
    if (done := _finished(config)) is not None:
        tell(f"{directory} holds this run, finished: nothing is left to do. Begin anew with --fresh.")
        return done
    if resumed:
        tell(f"{directory} holds an unfinished run: going on where it stopped.")
    moments = _Moments(demo, Path(config.model.llm), tell)
    try:
        result = run(config, resume=True, on_stage=moments, tracker=tracker)
    except ConfigError as error:
        if not resumed:
            raise
        raise ConfigError(f"{error} Or begin anew: metamorph demo --fresh.") from None

    tell("drawing samples for the page")
    began_page = time.perf_counter()
    pipeline = MetaMorphPipeline.from_pretrained(result.model_dir, demo.decoder, device=moments.device)
    _keep_decoder(demo.decoder, result.model_dir)
    samples = sample_blocks(Subject(pipeline, Path(config.model.llm), demo.steps), demo.few)
    rows, band = read_metrics(directory / "metrics.jsonl"), read_band()
    names = ["start", *(stage.name for stage in config.stages)]
    seconds = {**moments.seconds, "page": time.perf_counter() - began_page, "this process": time.perf_counter() - began}
    report = demo_report(
        moments.results[names[-1]],
        {moment: moments.results[name] for moment, name in zip(MOMENTS, names[:-1], strict=False)},
        seed=demo.seed,
        seconds=seconds,
        rows=rows,
        band=band,
        more={"name": config.name, "resumed": resumed, "parts": _parts(config, demo.decoder)},
    )
    (directory / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    add_results(result.model_dir / CARD, {**report, "command": "metamorph demo"})
    next_steps = _NEXT.format(model=result.model_dir)
    write(demo_page(report, rows, band, samples, next_steps), directory / PAGE)
    return Outcome(report, directory / REPORT, directory / PAGE, next_steps)


def _finished(config: RunConfig) -> Outcome | None:
    """What a finished run with the same settings left, if there is one."""
    directory = config.run_dir
    if (
        not all((directory / name).is_file() for name in ("config.yaml", REPORT, PAGE))
        or RunConfig.load(directory / "config.yaml") != config
    ):
        return None
    report = json.loads((directory / REPORT).read_text(encoding="utf-8"))
    return Outcome(report, directory / REPORT, directory / PAGE, _NEXT.format(model=directory / "model"))


def clear(directory: Path) -> None:
    """Remove what an earlier demo left in its run directory, and nothing else."""
    for name in _LEFT_BEHIND:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class _Moments:
    """Evaluates at step 0 and after each stage, once: what an earlier process measured is read, not measured again."""

    def __init__(self, demo: Demo, llm: Path, tell: Told) -> None:
        self.demo, self.llm, self.tell = demo, llm, tell
        self.results: dict[str, Results] = {}
        self.seconds: dict[str, float] = {}
        self.device = "cpu"
        self._decoder: VisualDecoderPipeline | None = None
        self._left = time.perf_counter()  # when training went on

    def __call__(self, name: str, model: Any, processor: Any) -> None:
        """The hook of `training.run`: "start", then each stage's name."""
        trained, began = time.perf_counter() - self._left, time.perf_counter()
        file = self.demo.config.run_dir / "evaluations" / f"{name}.json"
        samples = {task.name: self.demo.samples.get(task.name, task.samples) for task in evaluation_tasks(full=False)}
        kept = _read(file, {"seed": self.demo.seed, "samples": samples})
        if kept is not None:
            self.results[name], seconds = kept
            self.tell(f"{name}: evaluated before")
        else:
            self.tell("evaluating at step 0" if name == "start" else f"evaluating after stage {name}")
            self.results[name] = self._evaluate(name, model, processor)
            seconds = {f"evaluation {name}": time.perf_counter() - began}
            seconds = seconds if name == "start" else {f"training {name}": trained, **seconds}
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps({**self.results[name].to_dict(), "phases": seconds}, indent=2) + "\n", encoding="utf-8")
            unfinished.replace(file)
        self.seconds |= seconds
        self.device = str(model.device)
        self._left = time.perf_counter()

    def _evaluate(self, name: str, model: Any, processor: Any) -> Results:
        """All tasks on the model as it is now; those in which the language model has no part only the first time."""
        from metamorph.decoder import VisualDecoderPipeline

        if self._decoder is None:
            self._decoder = VisualDecoderPipeline.from_pretrained(self.demo.decoder)
        subject = Subject(MetaMorphPipeline(model, processor, self._decoder).to(model.device), self.llm, self.demo.steps)
        before = self.results.get("start")
        tasks = [task for task in evaluation_tasks(full=False) if before is None or task.name not in MODEL_FREE]
        found = evaluate(tasks, subject, seed=self.demo.seed, samples=self.demo.samples, told=self.tell)
        return combine([found, _only(before, MODEL_FREE)]) if before is not None else found


def _only(results: Results, tasks: tuple[str, ...]) -> Results:
    """The part of the results that came from these tasks; their metrics begin with the task's name."""
    return Results(
        {key: metric for key, metric in results.metrics.items() if key.startswith(tasks)},
        dict.fromkeys(tasks, 0.0),
        {"samples": {key: n for key, n in results.protocol["samples"].items() if key in tasks}},
    )


def _read(file: Path, protocol: Mapping[str, Any]) -> tuple[Results, dict[str, float]] | None:
    """An evaluation that was made before under the same protocol, with the seconds of its phases."""
    if not file.is_file():
        return None
    values = json.loads(file.read_text(encoding="utf-8"))
    if values["protocol"] != protocol:
        return None
    metrics = {name: Metric(**one) for name, one in values["metrics"].items()}
    return Results(metrics, values["seconds"], values["protocol"]), values["phases"]


def _keep_decoder(decoder: Path, model: Path) -> None:
    """Put the decoder beside the model that draws with it: `metamorph generate --model` then finds both."""
    if not (model / "decoder").is_dir():
        shutil.copytree(decoder, model / "decoder")


def _parts(config: RunConfig, decoder: Path) -> dict[str, str]:
    """Hashes of the weights from which the run started."""
    assert config.model is not None
    directories = {"llm": Path(str(config.model.llm)), "encoder": Path(str(config.model.vision)), "decoder": decoder}
    return {name: hash_weights(path) for name, path in directories.items()}
