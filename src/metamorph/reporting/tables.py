"""Tables from plain rows: for the terminal, for Markdown, and (by `page`) for HTML.

A cell is a string, a number, a truth value, an `Interval` or None. Numbers are aligned right and shown with three digits
after the point; None is shown as a dash, because an absent figure is not zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from metamorph.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table as RichTable

ABSENT = "–"


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval, and the number of cases it was measured on."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @classmethod
    def of(cls, figures: Mapping[str, float | int | None]) -> Interval:
        """From `{"value", "low", "high", "n"}` as a report's JSON holds it; further keys are left alone."""
        value, n = figures.get("value"), figures.get("n")
        if value is None:
            raise DataError(f"figures with the keys {sorted(figures)} but 'value' is needed. Was the metric measured?")
        return cls(value, figures.get("low"), figures.get("high"), None if n is None else int(n))


Cell: TypeAlias = str | bool | int | float | Interval | None


@dataclass(frozen=True)
class Table:
    """Named columns and rows of cells.

    Raises:
        DataError: a row is longer or shorter than the columns.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows, start=1):
            if len(row) != len(self.columns):
                raise DataError(f"{len(row)} cells but {len(self.columns)} columns (row {number}: {self.caption}). Absent cells are None.")

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether all its present cells are figures."""
        columns = [[row[i] for row in self.rows if row[i] is not None] for i in range(len(self.columns))]
        return [
            bool(cells) and all(isinstance(cell, int | float | Interval) and not isinstance(cell, bool) for cell in cells)
            for cells in columns
        ]


@dataclass(frozen=True)
class MetricRow:
    """One measured quantity beside what it must reach and what it is compared with.

    `references` holds, for instance, chance, the blind score, or the same key before training; absent ones may be None.
    """

    name: str
    result: Interval
    floor: float | None = None
    ceiling: float | None = None
    references: Mapping[str, float | Interval | None] = field(default_factory=dict)
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the value keeps its floor and its ceiling; None where there are none."""
        if self.floor is None and self.ceiling is None:
            return None
        low = float("-inf") if self.floor is None else self.floor
        return low <= self.result.value <= (float("inf") if self.ceiling is None else self.ceiling)

    @property
    def required(self) -> str | None:
        """What is asked of the value, in words."""
        parts = [("at least", self.floor), ("at most", self.ceiling)]
        return ", ".join(f"{words} {format_number(bound)}" for words, bound in parts if bound is not None) or None


def reference_names(rows: Sequence[MetricRow]) -> list[str]:
    """Names of all references, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row.references))


def metric_table(rows: Sequence[MetricRow], caption: str = "", *, narrow: bool = False) -> Table:
    """Metric rows as a plain table: value, interval, n, what is required, then one column per reference. `narrow` is for terminals."""
    names = reference_names(rows)
    described = ("95%", "n", "asked", "") if narrow else ("95% interval", "n", "required", "reached")
    describe = _described_narrowly if narrow else _described
    cells = [[row.name, row.result.value, *describe(row), *(row.references.get(name) for name in names)] for row in rows]
    return Table(["metric", "value", *described, *names], cells, caption)


def _described(row: MetricRow) -> list[Cell]:
    reached = {True: "yes", False: "no", None: None}[row.reached]
    return [format_interval(row.result), row.result.n, row.required, reached]


def _described_narrowly(row: MetricRow) -> list[Cell]:
    known = row.result.low is not None and row.result.high is not None
    asked = [f"{sign} {bound:.2f}" for sign, bound in (("≥", row.floor), ("≤", row.ceiling)) if bound is not None]
    mark = {True: "✓", False: "✗", None: ""}[row.reached]
    return [f"{row.result.low:.2f} – {row.result.high:.2f}" if known else None, row.result.n, ", ".join(asked) or None, mark]


def format_interval(result: Interval) -> str | None:
    """`0.812 to 0.871`, or None when the interval is not known."""
    return None if result.low is None or result.high is None else f"{format_number(result.low)} to {format_number(result.high)}"


def format_number(value: float | int) -> str:
    """A whole number with a thin space every three digits, any other with three digits after the point (four significant when tiny)."""
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if value != 0 and abs(value) < 0.0995 and round(value, 3) != round(value, 6):
        return f"{value:.3g}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}".replace(",", "\u202f")


def format_cell(cell: Cell) -> str:
    """A cell as plain text."""
    if cell is None:
        return ABSENT
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, Interval):
        interval = format_interval(cell)
        return format_number(cell.value) + (f" ({interval})" if interval else "")
    return format_number(cell) if isinstance(cell, int | float) else cell


def to_markdown(table: Table) -> str:
    """The table in Markdown; bars and line breaks in cells are kept from breaking it."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |"

    rule = "|" + "|".join(" ---: " if numeric else " --- " for numeric in table.numeric) + "|"
    body = [line([format_cell(cell) for cell in row]) for row in table.rows]
    caption = [table.caption, ""] if table.caption else []
    return "\n".join([*caption, line(list(table.columns)), rule, *body]) + "\n"


def to_rich(table: Table) -> RichTable:
    """The table for the terminal, to be shown by a `rich.console.Console`; markup in cells is text."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(title=Text(table.caption) if table.caption else None, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for name, numeric in zip(table.columns, table.numeric, strict=True):
        shown.add_column(Text(name), justify="right" if numeric else "left")
    for row in table.rows:
        shown.add_row(*(Text(format_cell(cell)) for cell in row))
    return shown
