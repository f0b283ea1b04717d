"""Tables: figures keep their meaning on the way to the terminal and to Markdown."""

import io
import math

import pytest
from rich.console import Console

from metamorph.errors import DataError
from metamorph.reporting.tables import Interval, MetricRow, Table, format_cell, format_number, metric_table, to_markdown, to_rich


def shown(table: Table) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(to_rich(table))
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.500"),
        (0, "0"),
        (0.0, "0.000"),
        (12345, "12\u202f345"),
        (4.9e-5, "4.9e-05"),
        (-0.0123456, "-0.0123"),
        (98765.4, "98\u202f765"),
        (1.0, "1.000"),
    ],
)
def test_numbers_are_readable(value, text):
    assert format_number(value) == text


def test_not_a_number_is_said():
    assert format_number(math.nan) == "nan"
    assert format_number(-math.inf) == "-inf"


def test_absent_is_not_zero_and_truth_is_not_one():
    assert format_cell(None) == "–"
    assert format_cell(True) == "yes"
    assert format_cell(Interval(0.5, 0.4, 0.6, 500)) == "0.500 (0.400 to 0.600)"
    assert format_cell(Interval(0.5)) == "0.500"


def test_markdown_keeps_its_shape_whatever_the_cells_hold():
    text = to_markdown(Table(["name", "a|b"], [["x|y\nz", 1.5], ["\\", None]], caption="two rows"))
    lines = text.splitlines()
    assert lines[0] == "two rows"
    assert lines[2:] == ["| name | a\\|b |", "| --- | ---: |", "| x\\|y<br>z | 1.500 |", "| \\\\ | – |"]


def test_row_of_another_length_is_refused_with_both_counts():
    with pytest.raises(DataError, match=r"1 cells but 2 columns \(row 2: "):
        Table(["a", "b"], [[1, 2], [3]])


def test_terminal_table_takes_markup_as_text():
    assert "[red]not markup[/red]" in shown(Table(["[b]name[/b]"], [["[red]not markup[/red]"]], caption="[i]c[/i]"))


def test_columns_of_flags_or_text_are_not_numeric():
    assert Table(["a", "b", "c", "d"], [[1, True, "x", None], [None, False, "y", None]]).numeric == [True, False, False, False]


def test_metric_table_has_a_column_for_every_reference():
    rows = [
        MetricRow("vqa_accuracy", Interval(0.8, 0.76, 0.83, 500), floor=0.75, references={"blind": 0.3}),
        MetricRow("drawing_exact", Interval(0.3, 0.24, 0.36, 200), floor=0.4, references={"chance": 0.01, "blind": None}),
        MetricRow("edit_exact", Interval(0.5)),
    ]
    table = metric_table(rows)
    assert table.columns == ["metric", "value", "95% interval", "n", "required", "reached", "blind", "chance"]
    assert table.rows[0] == ["vqa_accuracy", 0.8, "0.760 to 0.830", 500, "at least 0.750", "yes", 0.3, None]
    assert table.rows[1][5] == "no"
    assert table.rows[2][2:6] == [None, None, None, None]
    assert "0.760 to 0.830" in shown(table)


def test_interval_from_the_report():
    assert Interval.of({"value": 0.5, "low": 0.4, "high": 0.6, "n": 10, "majority": 0.2}) == Interval(0.5, 0.4, 0.6, 10)
    with pytest.raises(DataError, match="'value' is needed"):
        Interval.of({"low": 0.1})


def test_a_ceiling_is_kept_from_below():
    kept, missed = (MetricRow("text_perplexity_ratio", Interval(value), ceiling=1.2) for value in (1.1, 1.3))
    assert (kept.reached, missed.reached) == (True, False)
    assert kept.required == "at most 1.200"
    assert MetricRow("reported only", Interval(0.1)).reached is None
