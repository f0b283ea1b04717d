"""What is measured in the microworld, on how many samples, beside which baseline, and what it must reach.

The demo and the shipped model run the same tasks; they differ in the number of samples and in the floors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from metamorph.evaluation.metrics import Metric, Metrics
from metamorph.evaluation.runner import Results
from metamorph.evaluation.tasks import Task
from metamorph.microworld.answering import names_in_text, text_perplexity_ratio, video, vqa
from metamorph.microworld.drawing import (
    drawing,
    edits,
    held_out_combinations,
    named_drawing,
    next_frames,
    puzzle_drawing,
    reconstruction,
    visual_thinking,
)
from metamorph.microworld.subject import Subject
from metamorph.reporting.tables import Interval, MetricRow

Level = Literal["demo", "shipped"]
Run = Callable[[Subject, int, int], Metrics]

# Samples of each task: (demo, shipped). Where pictures are decoded 200 and 500; where not, 500; a task's rows, texts or names otherwise.
_TASKS: tuple[tuple[str, Run, int, int], ...] = (
    ("vqa", vqa, 540, 540),  # 60 of each of the nine scored types
    ("video", video, 500, 500),
    ("names_in_text", names_in_text, 512, 512),  # 8 questions about each name
    ("text_perplexity_ratio", text_perplexity_ratio, 128, 500),  # dialogues
    ("drawing", drawing, 200, 500),
    ("held_out_combinations", held_out_combinations, 200, 500),
    ("reconstruction", reconstruction, 200, 500),
    ("edits", edits, 200, 500),
    ("next_frames", next_frames, 200, 500),
    ("visual_thinking", visual_thinking, 200, 500),
    ("named_drawing", named_drawing, 200, 500),  # for each of the four groups of names
    ("puzzle_drawing", puzzle_drawing, 48, 48),  # all puzzles that there are
)
_BASELINES = ("blind", "chance", "copy_input", "swapped_crop")
MODEL_FREE = ("reconstruction",)
"""Tasks in which the language model has no part: the same figure at every stage."""


def evaluation_tasks(full: bool) -> list[Task[Subject]]:
    """All tasks: with the shipped model's numbers of samples if `full`, else with the demo's."""
    return [Task(name, run, shipped if full else demo) for name, run, demo, shipped in _TASKS]


@dataclass(frozen=True)
class Line:
    """A line of the table of results.

    `baseline` is the key of the metric to which `key` is compared, `compared` says what that is.
    """

    key: str
    what: str
    baseline: str = ""
    compared: str = ""
    demo: float | None = None
    shipped: float | None = None
    at_most: bool = False

    def bound(self, level: Level) -> float | None:
        """What the value must reach (or keep below, if `at_most`)."""
        return self.demo if level == "demo" else self.shipped


LINES: tuple[Line, ...] = (
    Line("vqa_accuracy", "answers to questions about pictures", "vqa_blind", "picture blanked", 0.75, 0.95),
    Line("vqa_over_blind", "how much seeing the picture adds", demo=0.30, shipped=0.30),
    Line("video_qa_accuracy", "answers about three-frame clips"),
    Line("drawing_exact", "full caption: the whole scene right", demo=0.40, shipped=0.80),
    Line(
        "drawing_attribute_accuracy", "full caption: attributes right", "drawing_attribute_chance", "scored by another caption", 0.80, 0.95
    ),
    Line("drawing_heldout_combinations", "the same, for colour-shape pairs never drawn in training", shipped=0.85),
    Line("reconstruction_exact", "real pictures encoded and decoded: the decoder's bound", demo=0.85, shipped=0.90),
    Line("token_skill", "predicted visual tokens: 1 = the true ones, 0 = always the mean ones", demo=0.60, shipped=0.80),
    Line("edit_exact", "picture and instruction to picture", "edit_copy_input", "input unchanged", shipped=0.60),
    Line("next_frame_exact", "the frame after two", "next_frame_copy_input", "last frame again", shipped=0.60),
    Line("thinking_crop_correct", "visual thinking: the drawn crop shows the asked object", shipped=0.80),
    Line(
        "thinking_answer_accuracy",
        "visual thinking: the answer",
        "thinking_answer_swapped_crop",
        "another picture's crop",
        shipped=0.90,
    ),
    Line("text_perplexity_ratio", "held-out text: perplexity after over before", shipped=1.2, at_most=True),
    Line("names_in_text", "what names mean, asked in text", shipped=0.90),
    *(
        Line(f"named_drawing/{group}", f"drawn by name: {words}", f"named_drawing_chance/{group}", "another name", shipped=floor)
        for group, words, floor in (
            ("text_only", "names known from text only", None),
            ("asked", "names asked about but never drawn", None),
            ("drawn", "names drawn but never asked about", None),
            ("both", "names both drawn and asked about", 0.90),
        )
    ),
    Line("puzzle_drawing/1_hop", "riddles of one fact, drawn"),
    Line("puzzle_drawing/2_hop", "riddles of two facts, drawn"),
)


def to_interval(metric: Metric) -> Interval:
    """The metric as tables and pages take it."""
    return Interval(metric.value, metric.low, metric.high, metric.n)


def metric_rows(metrics: Metrics, level: Level, before: Mapping[str, Metrics] | None = None) -> list[MetricRow]:
    """The table's rows: value, bound, baseline, and the same figure earlier (`before`: name of the moment -> metrics)."""
    rows = []
    for line in LINES:
        if line.key not in metrics:
            continue
        bound, baseline = line.bound(level), metrics.get(line.baseline)
        references: dict[str, float | Interval | None] = {
            name: earlier[line.key].value if line.key in earlier else None for name, earlier in (before or {}).items()
        }
        references["baseline"] = baseline.value if baseline is not None else None
        rows.append(
            MetricRow(
                line.key,
                to_interval(metrics[line.key]),
                floor=None if line.at_most else bound,
                ceiling=bound if line.at_most else None,
                references=references,
                note=f"{line.what}; baseline: {line.compared}" if baseline is not None else line.what,
            )
        )
    return rows


def requirements(metrics: Metrics, level: Level) -> dict[str, dict[str, Any]]:
    """For each bounded figure that was measured: the bound, the value, and whether it is kept. As reports store it."""
    found = {}
    for row in metric_rows(metrics, level):
        if row.reached is not None:
            bound = {"at_least": row.floor} if row.ceiling is None else {"at_most": row.ceiling}
            found[row.name] = {**bound, "value": row.result.value, "reached": row.reached}
    return found


def baselines(metrics: Metrics) -> dict[str, dict[str, float]]:
    """What each figure is compared with, by name: blind, majority, chance, copy_input, swapped_crop."""
    found: dict[str, dict[str, float]] = {}
    for line in LINES:
        if line.baseline in metrics:
            name = next(name for name in _BASELINES if name in line.baseline)
            found[line.key] = {name: metrics[line.baseline].value}
    for key, metric in metrics.items():
        name, _, sort = key.partition("/")
        for words in ("blind", "majority"):
            if name == f"vqa_{words}":
                found.setdefault(f"vqa_accuracy/{sort}" if sort else "vqa_accuracy", {})[words] = metric.value
    return found


def combine(parts: Sequence[Results]) -> Results:
    """Results of several calls as one."""
    return Results(
        {key: metric for part in parts for key, metric in part.metrics.items()},
        {key: seconds for part in parts for key, seconds in part.seconds.items()},
        {
            "seed": parts[0].protocol.get("seed"),
            "samples": {key: n for part in parts for key, n in part.protocol.get("samples", {}).items()},
        },
    )
