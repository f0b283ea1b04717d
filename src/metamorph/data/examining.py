"""One row of any source with what is wrong with it as values, where its reader tells: for commands that go on after a bad row."""

from __future__ import annotations

from metamorph.data.datasets.published import PublishedSource
from metamorph.data.faults import Fault, Report
from metamorph.data.mixture import ExampleSource
from metamorph.data.source import FileSource
from metamorph.messages import Example


def examine(source: ExampleSource, index: int, report: Report) -> Example | None:
    """Row `index` as an example, its faults told to `report`; None where they leave none.

    Raises:
        DataError: the row is broken, and its source is neither of files nor a published data set: it can but raise.
        IndexError: there is no such row.
    """
    if isinstance(source, FileSource):
        return source.examine(index, report)
    if not isinstance(source, PublishedSource):
        return source[index]
    row = source.row_or_fault(index)
    if isinstance(row, Fault):
        report(row)
        return None
    return source.examine(row, index, report)
