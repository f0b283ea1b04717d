"""Rows that cannot be used: refused, or by choice passed over, counted by source, written down, and refused above a limit.

A row that is passed over is replaced by the next good one of its source, so what a batch holds depends neither on the process that reads
it nor on what was read before. Each bad row counts once, however often it is met.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from metamorph.data.mixture import Draw, Mixture
from metamorph.errors import ContextLengthError, DataError, MetaMorphError, RecordError
from metamorph.messages import Example

Item = TypeVar("Item")
BAD = (DataError, ContextLengthError)
"""Errors of a row: malformed, a broken image, too long. Anything else is no fault of the data and is never passed over."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadRecord:
    """A row that was passed over."""

    source: str
    index: int
    """Of the row in its source, whatever part of it is used; of a stream, a number by which the row is known again."""
    error: str
    """What is wrong with it, and where it stands."""


@dataclass(frozen=True)
class RowReader(Generic[Item]):
    """From a draw to what a batch is made of. Goes to worker processes as a whole."""

    mixture: Mixture
    encode: Callable[[Example], Item]
    skip: int | None = None
    """Pass over at most so many bad rows that follow each other; None = refuse the first as it is."""

    def read(self, draw: Draw) -> tuple[Item, tuple[BadRecord, ...]]:
        """The drawn row, or the next good one of its source; and the bad ones in between.

        Raises:
            MetaMorphError: the row cannot be read or encoded; the message names it.
        """
        source, bad = self.mixture.sources[draw.source].source, []
        while True:
            row = Draw(draw.source, (draw.index + len(bad)) % len(source))
            try:
                return encoded(self.mixture.example(row), self.encode), tuple(bad)
            except BAD as error:
                if self.skip is None:
                    raise
                bad.append(BadRecord(source.name, self.mixture.row(row), str(error)))
                if len(bad) > self.skip or len(bad) == len(source):
                    raise _too_many(bad, len(source), self.skip, source.name) from error


def _too_many(bad: Sequence[BadRecord], rows: int, allowed: int, source: str) -> RecordError:
    found, expected = f"{len(bad)} bad rows one after another", f"at most {allowed} may be skipped"
    if len(bad) == rows:
        found, expected = f"{rows} bad rows, which are all", "at least one that can be used is needed"
    return RecordError(f"{found}, the last: {bad[-1].error} but {expected} (source {source}). metamorph data check names each.")


def encoded(example: Example, encode: Callable[[Example], Item]) -> Item:
    """An example encoded; an error names its place."""
    try:
        return encode(example)
    except MetaMorphError as error:
        if example.place in str(error):
            raise
        raise type(error)(f"{error} [{example.place}]") from error


class BadRecords:
    """The bad rows of a stage so far, over all processes, each once.

    Args:
        limit: the most that may be passed over.
        path: where they are written as JSON lines, beside those of other stages; None = nowhere. On several processes one of them writes.
        stage: named in each line.
    """

    def __init__(self, limit: int, path: Path | None = None, stage: str = "") -> None:
        self.limit, self.path, self.stage = limit, path, stage
        self._known: dict[tuple[str, int], BadRecord] = {}
        self._file_is_ours = False

    @property
    def counts(self) -> dict[str, int]:
        """Bad rows of each source that has some."""
        return dict(sorted(Counter(record.source for record in self._known.values()).items()))

    def add(self, records: Iterable[BadRecord]) -> None:
        """Count, log and write those that are new.

        Raises:
            RecordError: they are more than the limit.
        """
        new = {(record.source, record.index): record for record in records if (record.source, record.index) not in self._known}
        self._known |= new
        for record in new.values():
            error = record.error.encode(errors="backslashreplace").decode()  # names of files may be any bytes
            _log.warning("skipped a row of %s: %s", record.source, error)
        if new:
            self._write(new.values())
        if len(self._known) > self.limit:
            by_source = ", ".join(f"{count} of {source}" for source, count in self.counts.items())
            listed = f"They are listed in {self.path}. " if self.path is not None else ""
            found = f"{len(self._known)} bad rows ({by_source}; the last: {list(self._known.values())[-1].error})"
            raise RecordError(f"{found} but at most {self.limit} may be skipped (max_bad_records). {listed}Repair them or raise the limit.")

    def state_dict(self) -> list[list[Any]]:
        """Which rows were passed over, and why; plain JSON values, at most as many as the limit allows."""
        return [[record.source, record.index, record.error] for record in self._known.values()]

    def load_state_dict(self, state: Sequence[Sequence[Any]]) -> None:
        """Go on from a state; the next line written brings the file there as well."""
        self._known = {(source, index): BadRecord(source, index, error) for source, index, error in state}
        self._file_is_ours = False

    def _write(self, new: Iterable[BadRecord]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._file_is_ours:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(map(self._line, new))
            return
        before = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.is_file() else []
        others = [line for line in before if line.endswith("\n") and json.loads(line)["stage"] != self.stage]
        beside = self.path.with_suffix(".partial")
        beside.write_text("".join([*others, *map(self._line, self._known.values())]), encoding="utf-8", errors="backslashreplace")
        os.replace(beside, self.path)
        self._file_is_ours = True

    def _line(self, record: BadRecord) -> str:
        """JSON; bytes of a name that are not UTF-8, which no file takes as they are, become escapes of JSON."""
        return json.dumps({"stage": self.stage, **asdict(record)}, ensure_ascii=False) + "\n"
