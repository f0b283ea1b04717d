"""What a check found, as JSON for programs and as tables for people.

The JSON (`metamorph data check --json`), of which fields are added but neither renamed nor removed within a version:

    {"version": 1, "problems": 3, "sources": [{
      "name", "container", "format", "rows", "checked", "complete", "seconds",
      "kinds": {"image_qa": 812}, "images_per_row": {"0": 100, "1": 712}, "unread": ["topic"],
      "letters": {"min", "p25", "median", "p75", "p95", "max"}, "positions": {the same}, "measure": "counted with ...", "max_length",
      "targets": {"text", "visual"},
      "problems": [{"code", "severity": "error" | "warning", "place": "train.jsonl:812", "field": "image[1]",
                    "found", "expected", "remedy"}]}]}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from metamorph.data.check import SourceReport
from metamorph.data.faults import Fault
from metamorph.reporting.tables import Table, format_number

VERSION = 1
_PLAIN = ("name", "container", "format", "rows", "checked", "complete")
_PLAIN += ("kinds", "unread", "letters", "positions", "measure", "max_length", "targets")
SHOWN = 3
"""Problems of one code that are written out on a terminal."""
LISTED = 12
"""Names of fields that are."""


def to_json(reports: Sequence[SourceReport]) -> dict[str, Any]:
    """Plain JSON values, as drawn above."""
    return {"version": VERSION, "problems": sum(len(one.faults) for one in reports), "sources": [_source(one) for one in reports]}


def _source(report: SourceReport) -> dict[str, Any]:
    values = {name: getattr(report, name) for name in _PLAIN}
    values["seconds"] = round(report.seconds, 3)
    values["images_per_row"] = {str(number): rows for number, rows in report.images_per_row.items()}
    values["problems"] = [_problem(fault) for fault in report.faults]
    return values


def _problem(fault: Fault) -> dict[str, str]:
    return {name: getattr(fault, name) for name in ("code", "severity", "place", "field", "found", "expected", "remedy")}


def overview(reports: Sequence[SourceReport]) -> Table:
    """A line for each source."""
    rows = [
        [
            one.name,
            ", ".join(part for part in (one.container, one.format) if part) or None,
            one.rows,
            one.checked,
            sum(fault.severity == "error" for fault in one.faults),
            sum(fault.severity == "warning" for fault in one.faults),
        ]
        for one in reports
    ]
    return Table(["source", "what it is", "rows", "checked", "errors", "warnings"], rows)


def contents(report: SourceReport) -> Table:
    """What the usable rows of a source are made of."""
    images = {str(number): rows for number, rows in report.images_per_row.items()}
    limit = "none given (--max-length, --recipe or --model)"
    if report.max_length is not None:
        limit = f"{format_number(report.max_length)} positions"
    text, visual = (format_number(report.targets[kind]) for kind in ("text", "visual"))
    rows = [
        ["kinds", _counts(report.kinds)],
        ["images per row", _counts(images, "{count} rows with {name}")],
        ["characters of text per row", _spread(report.letters)],
        ["positions per row", _spread(report.positions)],
        ["targets", f"{text} text, {visual} visual tokens"],
        ["lengths are", report.measure],
        ["longest row allowed", limit],
    ]
    if report.unread:
        more = f" and {len(report.unread) - LISTED} more" if len(report.unread) > LISTED else ""
        rows.append(["fields not read", ", ".join(report.unread[:LISTED]) + more])
    return Table(["", report.name], rows)


def grouped(faults: Sequence[Fault]) -> Iterator[tuple[str, int, list[Fault]]]:
    """(code, how many, the first few) of each kind of problem, errors first, then the frequent."""
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        groups.setdefault((fault.severity, fault.code), []).append(fault)
    for (_, code), group in sorted(groups.items(), key=lambda pair: (pair[0][0], -len(pair[1]))):
        yield code, len(group), group[:SHOWN]


def _counts(counts: dict[str, int], words: str = "{name} {count}") -> str:
    return ", ".join(words.format(name=name, count=format_number(count)) for name, count in counts.items()) or "–"


def _spread(quantiles: dict[str, float]) -> str:
    return ", ".join(f"{name} {format_number(round(value))}" for name, value in quantiles.items()) or "–"
