"""Rows as they lie in files, before anybody asks what they mean: the protocol that all kinds of containers share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from metamorph.data.faults import Fault


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
        """Row `index`, or what is wrong with it, for a check that goes on."""
        ...

    def faults(self) -> Iterator[Fault]:
        """What is wrong with the file as a whole, found without reading rows one by one: its encoding, line ends, a half-written tail."""
        ...
