"""The report of a run, from plain values: `report.json` as a dictionary, and the page that shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metamorph.evaluation.metrics import Metric, Metrics
from metamorph.evaluation.runner import Results
from metamorph.microworld.report_curves import Rows, curve_blocks, share_in_band
from metamorph.microworld.report_origin import command, commit, machine, peak_memory_bytes, versions
from metamorph.microworld.suite import Level, baselines, metric_rows, requirements
from metamorph.reporting.blocks import Block, Code, Details, Facts, Heading, MetricBlock, Note, Paragraph, TableBlock
from metamorph.reporting.page import Page
from metamorph.reporting.tables import Table, metric_table

MOMENTS = {"at_step_0": "step 0", "after_stage_1": "after stage 1"}
"""Keys of earlier evaluations in a report, and how the page calls them."""

MEMORY_LIMIT = 4 * 2**30


def origin(seed: int) -> dict[str, Any]:
    """What every report says of where its figures come from."""
    return {"command": command(), "seed": seed, "commit": commit(), "machine": machine(), "versions": versions()}


def plain(metrics: Metrics) -> dict[str, dict[str, float | int]]:
    """Metrics as JSON holds them."""
    return {name: metric.to_dict() for name, metric in metrics.items()}


def results_report(results: Results, level: Level, seed: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """What demo and evaluation have in common: figures, what they are compared with, what they must reach, and their origin."""
    return {
        "dataset": "microworld",
        "metrics": plain(results.metrics),
        "baselines": baselines(results.metrics),
        "floors": requirements(results.metrics, level),
        "protocol": {**results.protocol, "interval": "95%: Wilson for shares, bootstrap for means", "decoding": "greedy"},
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "task_seconds": {name: round(value, 2) for name, value in results.seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(),
        **origin(seed),
    }


def demo_report(
    final: Results,
    earlier: Mapping[str, Results],
    *,
    seed: int,
    seconds: Mapping[str, float],
    rows: Rows,
    band: Mapping[str, Any] | None,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """`report.json` of the demo.

    Args:
        final: figures of the trained model.
        earlier: key of `MOMENTS` -> the same figures then.
        seed: of data, training and samples.
        seconds: by phase.
        rows: what the training loop logged.
        band: where losses are expected.
        more: further entries, such as the hashes of the parts.
    """
    return {
        **results_report(final, "demo", seed, seconds),
        **{moment: plain(results.metrics) for moment, results in earlier.items()},
        "earlier_task_seconds": {moment: {k: round(v, 2) for k, v in one.seconds.items()} for moment, one in earlier.items()},
        "share_of_losses_in_expected_band": share_in_band(rows, band),
        **more,
    }


def metrics_of(report: Mapping[str, Any], key: str = "metrics") -> dict[str, Metric]:
    """The metrics of a report again."""
    return {name: Metric(**values) for name, values in report.get(key, {}).items()}


def summary_table(report: Mapping[str, Any], level: Level) -> Table:
    """The table for the terminal: narrow, so that it fits."""
    before = {words: metrics_of(report, key) for key, words in MOMENTS.items() if key in report}
    return metric_table(metric_rows(metrics_of(report), level, before), narrow=True)


def verdict(report: Mapping[str, Any]) -> str:
    """How many floors are reached, in a sentence."""
    floors = report["floors"]
    missed = [name for name, floor in floors.items() if not floor["reached"]]
    reached = f"{len(floors) - len(missed)} of {len(floors)} required figures reached"
    return f"{reached}." if not missed else f"{reached}; not reached: {', '.join(missed)}."


def question_table(metrics: Metrics) -> Table:
    """Accuracy of each type of question beside the blind and the majority answer."""
    types = [key.partition("/")[2] for key in metrics if key.startswith("vqa_accuracy/")]
    sorts = ("vqa_accuracy", "vqa_blind", "vqa_majority")
    rows = [[name, *(metrics[f"{sort}/{name}"].value for sort in sorts), metrics[f"vqa_accuracy/{name}"].n] for name in types]
    columns = ["type of question", "accuracy", "picture blanked", "commonest answer", "n"]
    return Table(columns, rows, "Glyphs, fine detail, named things and facts are reported outside the required accuracy.")


def demo_page(report: Mapping[str, Any], rows: Rows, band: Mapping[str, Any] | None, samples: Sequence[Block], next_steps: str) -> Page:
    """The page: figures first, then what they mean in pictures, then how to repeat them."""
    metrics = metrics_of(report)
    before = {words: metrics_of(report, key) for key, words in MOMENTS.items() if key in report}
    swapped = metrics.get("thinking_answer_swapped_crop")
    table: list[Block] = [
        Heading("Figures"),
        Paragraph(verdict(report)),
        MetricBlock(
            metric_rows(metrics, "demo", before), "Test scenes, greedy decoding; intervals are 95%. The bar's tick is what is asked."
        ),
    ]
    if swapped is not None and swapped.value >= metrics["thinking_answer_accuracy"].value:
        table.append(Note("Answers after visual thinking do not get worse with another picture's crop: the thought is not used."))
    table.append(Details("Questions by type", [TableBlock(question_table(metrics))]))
    return Page(
        "A small language model learns to see and to draw",
        [*_opening(report), *table, Heading("Losses"), *curve_blocks(rows, band), *samples, *_closing(report, next_steps)],
        subtitle="MetaMorph demo: visual-predictive instruction tuning in a tiny world whose truth is known",
        footer=f"metamorph {report['versions']['metamorph']}, commit {report['commit'] or 'unknown'}, seed {report['seed']}",
    )


def _opening(report: Mapping[str, Any]) -> list[Block]:
    seconds = report["seconds"]
    training = sum(value for name, value in seconds.items() if name.startswith("training"))
    evaluation = sum(value for name, value in seconds.items() if name.startswith("evaluation"))
    blocks: list[Block] = [
        Paragraph(
            "A language model that had read only text, and a frozen vision encoder, became one model that answers questions about "
            "pictures and draws: stage 1 trained the projector, stage 2 everything but the encoder, with next-token cross-entropy for "
            "words and cosine for visual tokens. A separate decoder turns visual tokens into pixels."
        ),
        Paragraph(
            f"Training took {training / 60:.1f} minutes, evaluation {evaluation / 60:.1f}, "
            f"memory peaked at {report['peak_memory_bytes'] / 2**30:.1f} GB."
        ),
    ]
    if report.get("resumed"):
        blocks.append(Note("This run was interrupted and resumed: times of training are those of the last process."))
    if report["peak_memory_bytes"] > MEMORY_LIMIT:
        blocks.append(Note("Memory peaked above 4 GB, more than this demo should need."))
    return blocks


def _closing(report: Mapping[str, Any], next_steps: str) -> list[Block]:
    facts = {"command": report["command"], "commit": report["commit"], "seed": report["seed"]}
    machine = {name.replace("_gb", ""): f"{value} GB" if name.endswith("_gb") else value for name, value in report["machine"].items()}
    times = Table(["phase", "seconds"], [[name, value] for name, value in report["seconds"].items()])
    return [
        Heading("How it was made"),
        Facts({**facts, "peak memory": f"{report['peak_memory_bytes'] / 2**30:.2f} GB", **machine, **report["versions"]}),
        TableBlock(times),
        Heading("What to try next"),
        Code(next_steps),
    ]
