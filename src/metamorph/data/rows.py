"""Rows as they lie in files, before anybody asks what they mean: the protocol that all kinds of containers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from metamorph.data.faults import Fault, raise_errors
from metamorph.errors import RecordError


@dataclass(frozen=True)
class RawRow:
    """One row, its fields as they were found. Media: paths, bytes, or `{"bytes", "path"}` as Hugging Face's Image feature has it."""

    values: Mapping[str, Any]
    place: str  # how errors name it: "train.jsonl:812", "train.parquet row 7", "shard-000.tar sample 000123"


@runtime_checkable
class Rows(Protocol):
    """A container of rows with random access; the same row whenever and wherever it is asked for."""

    @property
    def name(self) -> str:
        """How tables and errors call it."""
        ...

    @property
    def root(self) -> Path | None:
        """The folder to which relative media paths refer and which they may not leave; None: rows hold no paths."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> RawRow:
        """Row `index`.

        Raises:
            RecordError: it cannot be read; the message names file and line.
            IndexError: there is no such row.
        """
        ...

    def row_or_fault(self, index: int, /) -> RawRow | Fault:
        """Row `index`, or what is wrong with it as a value: `self[index]` raises just that.

        Raises:
            IndexError: there is no such row.
        """
        ...

    def faults(self) -> Iterator[Fault]:
        """What is wrong with the file as a whole, found without reading rows one by one: its encoding, line ends, a half-written tail.

        An error among them means that rows are missing or unreadable, so whoever trains asks before it begins. Where a row is at fault,
        `row_or_fault` returns an equal fault, so that a report can tell that it has it already.
        """
        ...


class FaultyRows(ABC):
    """The part that all containers share: whatever is wrong with a row is a value first, and an error where the row itself is asked for."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row_or_fault(self, index: int, /) -> RawRow | Fault:
        """Row `index`, or what is wrong with it."""

    def __getitem__(self, index: int, /) -> RawRow:
        """Row `index`.

        Raises:
            RecordError: it cannot be read; the message names file and line.
            IndexError: there is no such row.
        """
        row = self.row_or_fault(index)
        if isinstance(row, Fault):
            raise row.error()
        return row

    def check_index(self, index: int, name: str) -> None:
        """Refuse what is no row; negative numbers are none.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} but 0 to {len(self) - 1} exist ({name})")


def no_rows(path: Path, expected: str) -> Fault:
    """A file without rows, which is an error: a source that gives nothing cannot be meant."""
    return Fault("empty", str(path), "", "0 rows", f"{expected} is expected", "Fill the file or leave it out.")


OF_ONE_ROW = frozenset({"orphan"})
"""Codes of faults of a file that concern one row only: whoever reads that row meets them there."""


def refuse_broken_files(rows: Rows) -> None:
    """Raise what is wrong with a file as a whole, so that training does not begin on a part of it.

    Raises:
        RecordError: it cannot be read, is cut off, or holds no rows.
    """
    for fault in rows.faults():
        if fault.code not in OF_ONE_ROW:
            raise_errors(fault)
    if not len(rows):
        raise RecordError(f"0 rows but at least 1 is needed ({rows.name}). Fill the file or leave it out.")
