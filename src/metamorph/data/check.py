"""A data set checked before training: every fault with its place, and what its rows are made of, from a sample or from all of it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context

import numpy as np
from jaxtyping import Int64

from metamorph.data.cross_checks import (
    ABSENT,
    Shape,
    absent_column,
    changing_fields,
    renamed_images,
    repeated_ids,
    repeated_rows,
    unknown_columns,
)
from metamorph.data.datasets.published import PublishedSource
from metamorph.data.faults import Fault
from metamorph.data.findings import Findings
from metamorph.data.image_folder import FILE_COLUMNS
from metamorph.data.mixture import ExampleSource, shuffled
from metamorph.data.record_fields import fields_of
from metamorph.data.records import RecordSettings
from metamorph.data.row_checks import OWN_NAMES, CheckSettings, RowChecker
from metamorph.data.rows import Rows
from metamorph.data.source import FileSource

SAMPLE = 2000
"""Rows that are checked where not all are asked for."""
QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
_CHUNK = 256  # rows that a process checks before it tells
_REREAD = 4096  # rows with something to compare that are kept
_PLACE = re.compile(r"(:\d+|\[\d+\]| row \d+| sample \S+)$")  # what names a row behind its file
_CONTAINERS = {
    "JsonLines": "JSON lines",
    "JsonArray": "JSON array",
    "CsvLines": "CSV",
    "CaptionedImages": "folder of images",
    "TableRows": "Parquet",
    "TarSamples": "WebDataset tar",
    "ChosenRows": "WebDataset tar, filtered",
    "FirstRows": "first rows of a stream",
}

Told = Callable[[int, int], None]
"""Is told (rows done, rows in all)."""


@dataclass(frozen=True)
class SourceReport:
    """What a check found in one source."""

    name: str
    container: str  # "JSON lines"; "" where it is no file
    format: str  # as `metamorph.data.formats` has it; "" where it is not known
    rows: int
    checked: int  # rows; fewer than `rows` where a sample was taken
    faults: tuple[Fault, ...]  # of the files first, then in the order of rows
    kinds: dict[str, int]  # kind of conversation -> usable rows
    images_per_row: dict[int, int]  # images -> rows
    unread: tuple[str, ...]  # fields of its rows that no format reads
    letters: dict[str, float]  # quantiles of the characters of text of a row
    positions: dict[str, float]  # ... of its positions
    targets: dict[str, int]  # "text": positions, "visual": visual tokens, over the rows checked
    measure: str  # how positions were counted
    max_length: int | None
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every row was checked."""
        return self.checked == self.rows


def check(
    source: ExampleSource,
    settings: CheckSettings | None = None,
    *,
    sample: int | None = SAMPLE,
    jobs: int = 1,
    told: Told | None = None,
) -> SourceReport:
    """Check the rows of a source.

    Args:
        source: what training would read.
        settings: what is asked of rows.
        sample: rows to check, spread evenly over the source and the same each time; None = all.
        jobs: processes (started anew, so that the source must be picklable); 1 = this one.
        told: is told of progress.
    """
    started, settings = time.perf_counter(), settings or CheckSettings()
    indices = spread(len(source), len(source) if sample is None else sample)
    total = Findings()
    for findings in _findings(source, settings, indices, jobs):
        total.merge(findings)
        if told is not None:
            told(total.rows, len(indices))
    rows = _files_of(source)
    of_files, place = ([], source.name) if rows is None else (list(rows.faults()), _file_of(rows))
    if isinstance(source, FileSource):
        of_files += unknown_columns(source.settings.columns, list(total.columns), total.readable, place)
    found = [*_of_rows(total, of_files, place), *_compared(source, settings, total)]
    found.sort(key=lambda pair: pair[0])  # stable: what a row says of itself stays before what others say of it
    lengths = total.table("lengths", 3)
    return SourceReport(
        name=source.name,
        container="" if rows is None else container_of(rows),
        format=str(source.settings.format or "") if isinstance(source, FileSource) else "",
        rows=len(source),
        checked=len(indices),
        faults=tuple(dict.fromkeys([*of_files, *(fault for _, fault in found)])),
        kinds=dict(total.kinds.most_common()),
        images_per_row=dict(sorted(total.images_per_row.items())),
        unread=_unread(total, source.settings) if isinstance(source, FileSource) else (),
        letters=_quantiles(total.table("letters", 1)[:, 0]),
        positions=_quantiles(lengths[:, 0]),
        targets={"text": int(lengths[:, 1].sum()), "visual": int(lengths[:, 2].sum())},
        measure=settings.measure.how,
        max_length=settings.max_length,
        seconds=time.perf_counter() - started,
    )


def spread(rows: int, wanted: int) -> Sequence[int]:
    """`wanted` row numbers, one from each of as many equal stretches, the first and the last row among them; the same each time."""
    if wanted >= rows:
        return range(rows)
    picked = []
    for number in range(max(wanted, 1)):
        start, end = number * rows // wanted, (number + 1) * rows // wanted
        picked.append(start + shuffled(number % (end - start), end - start, number))
    picked[0] = 0
    return [*picked[:-1], rows - 1] if len(picked) > 1 else picked


def container_of(rows: Rows) -> str:
    """What kind of files these are, in words."""
    parts: Sequence[Rows] = getattr(rows, "parts", (rows,))
    names = dict.fromkeys(_CONTAINERS.get(type(part).__name__, type(part).__name__) for part in parts)
    files = f" ({len(parts)} files)" if len(parts) > 1 else ""
    return ", ".join(names) + files


def _findings(source: ExampleSource, settings: CheckSettings, indices: Sequence[int], jobs: int) -> Iterator[Findings]:
    """What is found in each chunk of rows, chunk after chunk."""
    chunks = [indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)]
    if jobs <= 1 or len(chunks) == 1:
        checker = RowChecker(source, settings)
        yield from (_check_rows(checker, chunk) for chunk in chunks)
        return
    workers = min(jobs, len(chunks))
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(source, settings)) as pool:
        try:
            yield from pool.map(_check_in_worker, chunks)
        finally:
            pool.shutdown(cancel_futures=True)


def _check_rows(checker: RowChecker, indices: Sequence[int]) -> Findings:
    findings = Findings()
    for index in indices:
        findings.add(index, checker.check(index))
    return findings


_workers_own: list[RowChecker] = []  # in a worker process: its checker, made once; empty everywhere else


def _start_worker(source: ExampleSource, settings: CheckSettings) -> None:
    _workers_own.append(RowChecker(source, settings))


def _check_in_worker(indices: Sequence[int]) -> Findings:
    return _check_rows(_workers_own[0], indices)


def _of_rows(total: Findings, of_files: list[Fault], place: str) -> list[tuple[int, Fault]]:
    """The faults of single rows; those that only say that a column is absent become one of the file, which is added to `of_files`."""
    fault = absent_column(total.faults, _shapes(total), total.readable, place, list(total.columns))
    if fault is None:
        return total.faults
    of_files.append(fault)
    return [(row, fault) for row, fault in total.faults if fault.code not in ABSENT]


def _shapes(total: Findings) -> list[Shape]:
    return [Shape(name, kind, first, count) for (name, kind), (first, count) in total.shapes.items()]


def _unread(total: Findings, settings: RecordSettings) -> tuple[str, ...]:
    """Fields of rows that mean nothing here: another's data, a second form of the same, or a name that nobody guessed."""
    files = FILE_COLUMNS if settings.format == "pairs" else ()
    read = {*fields_of(settings.format), *settings.columns.values(), *files, *OWN_NAMES}
    return tuple(name for name in total.columns if name and name not in read)


def _files_of(source: ExampleSource) -> Rows | None:
    """The container of a source that reads one of ours."""
    rows = source.rows if isinstance(source, FileSource | PublishedSource) else None
    return rows if isinstance(rows, Rows) else None


def _file_of(rows: Rows) -> str:
    """The file of the rows, as far as there is one: what their places begin with."""
    parts: Sequence[Rows] = getattr(rows, "parts", (rows,))
    first = parts[0].row_or_fault(0).place if len(parts[0]) else rows.name
    return _PLACE.sub("", first)


def _compared(source: ExampleSource, settings: CheckSettings, total: Findings) -> Iterator[tuple[int, Fault]]:
    """What only several rows together show."""
    checker = RowChecker(source, settings)
    read = lru_cache(maxsize=_REREAD)(lambda index: replace(checker.check(index), example=None))  # which may hold images, and videos
    repeated = list(repeated_rows(total.table("contents", 2), read))
    yield from repeated
    yield from repeated_ids(total.table("ids", 2), read, {row for row, _ in repeated})
    yield from renamed_images(total.table("images", 3), read)
    yield from changing_fields(_shapes(total), lambda index: read(index).place)


def _quantiles(values: Int64[np.ndarray, " m"]) -> dict[str, float]:
    """Of a distribution; empty where nothing was measured."""
    return {name: float(np.quantile(values, share)) for name, share in QUANTILES.items()} if len(values) else {}
