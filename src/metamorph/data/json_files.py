"""Rows of JSON files: one object per line, or one array of objects; any row is read by itself, the file never as a whole.

Why not Hugging Face `datasets`: it turns an `image` column that becomes a list late in the file into the string of a list, reports a broken
line without saying where, and takes minutes to open millions of rows. Here each row is parsed alone, when it is asked for, so that rows may
differ in their fields and types, and whatever is wrong has a file and a line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from metamorph.data.array_index import ArrayIndex
from metamorph.data.faults import Fault
from metamorph.data.file_index import Progress
from metamorph.data.line_index import BLANK, LineIndex
from metamorph.data.rows import RawRow, no_rows
from metamorph.data.text_rows import TextRows


class JsonLines(TextRows[LineIndex]):
    """The rows of a JSON-lines file; blank lines are passed over. Arguments and errors: see `TextRows`."""

    def row_or_fault(self, index: int, /) -> RawRow | Fault:
        """The object on a line, or what is wrong with it.

        Raises:
            IndexError: there is no such row.
        """
        self.check_index(index, str(self.path))
        place = f"{self.path}:{self._index.line(index)}"
        data = self._read(index, place)
        if isinstance(data, Fault):
            return data
        last = index == len(self) - 1 and self._index.ends_open
        return parse_row(data, place, cut_off_at="the end of the file" if last else "")

    def _open_index(self, progress: Progress) -> LineIndex:
        return LineIndex(self.path, progress=progress)

    def _faults(self) -> Iterator[Fault]:
        """Line ends of Windows, no rows at all, a last line that is half-written."""
        yield from self._line_ends()
        if not len(self):
            yield no_rows(self.path, "one JSON object per line")
        elif self._index.ends_open and isinstance(fault := self.row_or_fault(len(self) - 1), Fault) and fault.code == "half-written":
            yield fault


class JsonArray(TextRows[ArrayIndex]):
    """The elements of a JSON file that is one array, as LLaVA's are, each read by itself. Arguments and errors: see `TextRows`."""

    def row_or_fault(self, index: int, /) -> RawRow | Fault:
        """An element, or what is wrong with it.

        Raises:
            IndexError: there is no such row.
        """
        self.check_index(index, str(self.path))
        place = self._place(index)
        data = self._read(index, place)
        if isinstance(data, Fault):
            return data
        data, last, closed = data.strip(BLANK), index == len(self) - 1, self._index.is_closed
        if last and closed and data.endswith(b"},"):
            return Fault("json", place, "", "a comma behind the last element", "the array's ] is expected", "Delete the comma.")
        if data.endswith(b",") and not (last and closed):
            data = data[:-1]
        elif not last:
            return Fault("json", place, "", "no comma after the element", "one is expected before the next", "Repair the file.")
        return parse_row(data, place, cut_off_at="" if closed else "the end of the file")

    def _open_index(self, progress: Progress) -> ArrayIndex:
        return ArrayIndex(self.path, progress=progress)

    def _faults(self) -> Iterator[Fault]:
        """Line ends of Windows, no elements, an array that is cut off, text before or behind it."""
        yield from self._line_ends()
        place, end = str(self.path), self._index.end
        if self._index.stray_head:
            found = f"{self._index.stray_head!r} before the first object"
            yield Fault("json", place, "", found, "an array of objects is expected", "Write objects only.")
        if not len(self):
            yield no_rows(self.path, "an array of JSON objects")
        if not self._index.is_closed:
            fault = self.row_or_fault(len(self) - 1) if len(self) else None
            if isinstance(fault, Fault):
                yield fault
            else:
                found, remedy = f"an array that the file's end, byte {end}, cuts off", "Write the file again, or end it with a ]."
                yield Fault("half-written", self._place(len(self) - 1) if len(self) else place, "", found, "a ] is expected", remedy)
        elif stray := self._index.stray_tail:
            found = f"an array that ends at byte {end}, with {stray!r} behind it"
            remedy = "Look for a bracket or quote too many before that place, or write one object per line."
            yield Fault("json", f"{self.path}:{self._index.end_line}", "", found, "nothing is expected there", remedy)

    def _place(self, index: int) -> str:
        line = self._index.line(index)
        return f"{self.path}[{index}]" if line is None else f"{self.path}:{line}"


def parse_row(data: bytes, place: str, *, cut_off_at: str = "") -> RawRow | Fault:
    """One object, strictly: UTF-8, keys that differ, numbers that JSON has.

    Args:
        data: the object's bytes; white space around it is passed over.
        place: file and line.
        cut_off_at: where `data` ends, if that is where the writing may have stopped.
    """
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return _not_parsed(data, error, place, cut_off_at)
    if not isinstance(values, Mapping):
        found = f"{_kind(values)} of JSON"
        return Fault("not-an-object", place, "", found, "an object with named fields is expected", "Write each row as {...}.")
    return RawRow(values, place)


def _not_parsed(data: bytes, error: ValueError | RecursionError, place: str, cut_off_at: str) -> Fault:
    """Why a row is no JSON: it breaks off, is not UTF-8, or is wrong somewhere in between."""
    if cut_off_at and _breaks_off(data, error):
        remedy = "Delete it, or write the file again: writing or copying was interrupted."
        return Fault("half-written", place, "", f"a row that breaks off at {cut_off_at}", "a whole JSON object is expected", remedy)
    if isinstance(error, UnicodeDecodeError):
        found = f"bytes that are not UTF-8 ({error.reason} at byte {error.start} of the row)"
        return Fault("encoding", place, "", found, "UTF-8 is expected", "Save the file as UTF-8.")
    reason = str(error)
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg.removesuffix(' at')} at character {error.pos} of the row"
        if re.search(r",\s*$", error.doc[: error.pos]) and error.doc[error.pos : error.pos + 1] in ("}", "]"):
            reason += ", behind a comma that nothing follows"
    return Fault("json", place, "", f"a row that is no JSON ({reason})", "one object is expected", "Repair or delete it.")


def _breaks_off(data: bytes, error: ValueError | RecursionError) -> bool:
    """Whether all is well up to the end: a string without end, a character cut in two, or nothing where something must follow."""
    if isinstance(error, UnicodeDecodeError):
        return error.end == len(data)
    if not isinstance(error, json.JSONDecodeError):
        return False
    rest = len(error.doc.rstrip()) - error.pos
    return rest <= len("false") or "Unterminated string" in error.msg or ("escape" in error.msg and rest <= len("\\uD83D"))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ; JSON would let the last of two equal keys win silently."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} twice in one object")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON has")


def _kind(value: Any) -> str:
    """What a value is called in JSON."""
    if isinstance(value, bool):
        return "a boolean"
    names: dict[type, str] = {list: "an array", str: "a string", int: "a number", float: "a number", type(None): "a null"}
    return names.get(type(value), "a value")
