"""results/README.md from the JSON files beside it.

How:

    python benchmarks/table.py            # write it
    python benchmarks/table.py --check    # say whether it is up to date
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import RESULTS

from metamorph.reporting.tables import Cell, Interval, Table, to_markdown


@dataclass(frozen=True)
class Section:
    """One table: which rows of which file, and under which headings their values stand."""

    name: str
    title: str
    columns: dict[str, str]  # heading -> key; a dot leads into a nested value

    def text(self, content: dict[str, Any]) -> str:
        """Title, table, and where the figures come from."""
        first = next(iter(self.columns.values()))
        rows = [[_cell(row, key) for key in self.columns.values()] for row in content["rows"] if first in row]
        lines = [f"## {self.title}", to_markdown(Table(list(self.columns), rows)).strip(), f"`{content['command']}`"]
        if found := content.get("machine"):
            versions = f"Python {found['python']}, torch {found['torch']}, transformers {found['transformers']}"
            load = f"load {found['load']} on {found['cores']} cores, {found['threads']} threads"
            lines.append(f"{found['date']}, {found['processor']}, {load}, {versions}.")
        return "\n\n".join(lines) if rows else ""


SECTIONS = (
    Section(
        "generation",
        "Cached generation, times faster than reading everything anew",
        {
            "images": "images",
            "goal": "goal",
            "than the authors' way (logits of all positions)": "times_faster_than_all",
            "the same in processor time": "times_faster_than_all_cpu",
            "than logits of the last position only": "times_faster_than_last",
            "the same in processor time ": "times_faster_than_last_cpu",
            "seconds, cached": "cached_seconds",
            "seconds, all": "all_seconds",
            "their step / bare forward": "all_step_speed_of_bare_forward",
        },
    ),
    Section(
        "generation",
        "A batch against one row",
        {
            "rows": "batch",
            "goal": "goal",
            "times more images per second": "times_more_images",
            "one row, images/s": "images_per_second_one",
            "batch, images/s": "images_per_second_batch",
        },
    ),
    Section(
        "data",
        "Microworld data per second",
        {
            "what": "what",
            "processes": "processes",
            "goal": "goal",
            "per second": "per_second",
            "per second of processor time": "per_second_of_processor_time",
        },
    ),
    Section(
        "data_wait",
        "Share of a step of the demo spent waiting for data",
        {"stage": "stage", "goal (at most)": "goal", "share": "share_waited", "seconds per step": "seconds_per_step", "steps": "steps"},
    ),
    Section(
        "packing",
        "Packed against padded batches of the same rows",
        {
            "pack length": "pack_length",
            "rows": "rows",
            "left out as too long": "rows_left_out",
            "fill, packed": "fill",
            "goal": "fill_goal",
            "fill, padded": "fill_padded",
            "real tokens/s, padded": "tokens_per_second_padded",
            "real tokens/s, packed": "tokens_per_second_packed",
            "times faster": "times_faster",
            "the same in processor time": "times_faster_cpu",
        },
    ),
    Section(
        "index",
        "A JSON file of millions of rows: scanned once, opened, read at random (goals: 100 MB/s, 1 s)",
        {
            "rows": "rows",
            "layout": "layout",
            "measured?": "measured",
            "file, MB": "file_mb",
            "index, MB": "index_mb",
            "scan, s": "build_seconds",
            "scan, MB/s": "build_mb_per_second",
            "open, s": "open_seconds",
            "random row, µs": "read_us",
            "own memory when open, MiB": "open_own_mib",
            "own memory after reading, MiB": "own_after_mib",
            "with mapped pages, MiB": "rss_after_mib",
        },
    ),
    Section(
        "loader",
        "Share of a step spent waiting for files that two worker processes read",
        {"stage": "stage", "goal (at most)": "goal", "share": "share_waited", "seconds per step": "seconds_per_step", "steps": "steps"},
    ),
    Section(
        "images",
        "A JPEG to the encoder's pixels, against bare PIL",
        {
            "image": "image",
            "goal (at least)": "goal",
            "share of bare PIL's images per second": "share",
            "the same in processor time": "share_cpu",
            "bare PIL, images/s": "per_second_bare",
            "ours, images/s": "per_second_ours",
            "ours with scaled_jpeg, images/s": "per_second_scaled",
        },
    ),
    Section(
        "imports",
        "Cold starts, seconds",
        {"what": "what", "goal (at most)": "goal", "seconds": "seconds", "without the interpreter's own": "seconds_without_python"},
    ),
    Section(
        "visual_tokens",
        "How many visual tokens?",
        {
            "k": "k",
            "positions per image": "positions_per_image",
            "images in the context": "images_in_context",
            "questions answered": "metrics.vqa_accuracy",
            "scenes drawn exactly": "metrics.drawing_exact",
            "attributes drawn": "metrics.drawing_attribute_accuracy",
            "scenes rebuilt exactly": "metrics.reconstruction_exact",
            "training, s (shared machine)": "training_seconds",
        },
    ),
)


def _cell(row: dict[str, Any], key: str) -> Cell:
    value: Any = row
    for part in key.split("."):
        value = None if value is None else value.get(part)
    if isinstance(value, dict):
        return Interval.of(value)
    return f"{value:.4g}" if isinstance(value, float) else value


def page(results: Path) -> str:
    """The whole page."""
    texts = [Section.text(one, json.loads(path.read_text())) for one in SECTIONS if (path := results / f"{one.name}.json").is_file()]
    head = "# Results\n\nMade by `python benchmarks/table.py` from the files in this directory; how they were measured: `../README.md`."
    return "\n\n".join([head, *(text for text in texts if text)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    given, target = parser.parse_args(), RESULTS / "README.md"
    if not given.check:
        target.write_text(page(RESULTS))
    elif target.read_text() != page(RESULTS):
        sys.exit(f"{target.name} is older than the results. Run python benchmarks/table.py.")


if __name__ == "__main__":
    main()
