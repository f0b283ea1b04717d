"""What can be wrong with a row or a file of data: found, expected, where, and what to do. One value for errors and for reports.

Whoever reads a row calls `report(fault)`. Training gives a `report` that raises (`raise_errors`), a check gives one that collects
(`list.append`), so that both judge by the same code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from metamorph.errors import DataError, MediaError, MetaMorphError, RecordError

Severity: TypeAlias = Literal["error", "warning"]
"""The row cannot be used; or it can, but is hardly what its author meant."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    code: str  # stable name of the kind of fault: "image-missing"
    place: str  # "train.jsonl:812"; a file's name where the whole file is meant
    field: str  # "image", "conversations[1].value"; "" where the whole row is meant
    found: str
    expected: str
    remedy: str
    severity: Severity = "error"
    media: bool = False  # an image or video is at fault, not the record that names it

    def __str__(self) -> str:
        """As a report prints it: `file:line field: found but expected. Remedy`."""
        where = f"{self.place} {self.field}" if self.field else self.place
        return f"{where}: {self.found} but {self.expected}. {self.remedy}"

    def error(self) -> DataError:
        """As an exception, in the form of all our errors."""
        where = f"{self.place}, {self.field}" if self.field else self.place
        message = f"{self.found} but {self.expected} ({where}). {self.remedy}"
        error = MediaError(message) if self.media else RecordError(message)
        error.fault = (self.code, self.found, self.expected, self.remedy)
        return error


_MESSAGE = re.compile(r"(?P<found>.*?) but (?P<expected>.*?)(?: \((?P<place>[^()]*(?:\([^()]*\)[^()]*)*)\))?\. (?P<remedy>.*)", re.DOTALL)


def from_error(error: MetaMorphError, code: str, place: str, field: str = "") -> Fault:
    """One of our errors as a fault, its message taken apart; of media where it is a MediaError. A code of its own stays."""
    media = isinstance(error, MediaError)
    if isinstance(error, DataError) and error.fault is not None:
        code, found, expected, remedy = error.fault
        return Fault(code, place, field, found, expected, remedy, media=media)
    match = _MESSAGE.fullmatch(str(error))
    if match is None:
        return Fault(code, place, field, str(error), "a row that can be used is needed", "Correct or drop the row.", media=media)
    return Fault(code, place, field, match["found"], match["expected"], match["remedy"], media=media)


Report: TypeAlias = Callable[[Fault], None]


def raise_errors(fault: Fault) -> None:
    """The `report` of training: an error is raised, a warning passes."""
    if fault.severity == "error":
        raise fault.error()
