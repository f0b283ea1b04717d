"""Rows of JSON files: one object per line, or one array of objects; any row is read by itself, the file never as a whole.

Why not Hugging Face `datasets`: it turns an `image` column that becomes a list late in the file into the string of a list, reports a broken
line without saying where, and takes minutes to open millions of rows. Here each row is parsed alone, when it is asked for, so that rows may
differ in their fields and types, and whatever is wrong has a file and a line.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from metamorph.data.array_index import ArrayIndex
from metamorph.data.faults import Fault
from metamorph.data.file_index import Progress
from metamorph.data.line_index import BLANK, LineIndex, read_span
from metamorph.data.rows import FaultyRows, RawRow
from metamorph.errors import RecordError

MAX_ROW_BYTES = 2**26
"""A longer row is refused unread: nobody writes 64 MiB of conversation, but many a broken file has one endless line."""

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_HEAD = 4096


class JsonLines(FaultyRows):
    """The rows of a JSON-lines file; blank lines are passed over. Threads and processes may share it.

    Args:
        path: the file.
        image_root: the folder to which media paths refer; default: the file's own.
        name: how tables and errors call it; default: the file's name without ending.
        max_line_bytes: a longer line is refused unread.
        progress: show how far the index is.

    Raises:
        RecordError: the file cannot be read, or its index cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        image_root: Path | None = None,
        name: str = "",
        max_line_bytes: int = MAX_ROW_BYTES,
        progress: Progress = False,
    ) -> None:
        self.path, self.root, self.name = path, image_root or path.parent, name or path.stem
        self._max_line_bytes = max_line_bytes
        self._encoding = encoding_fault(path)
        self._lines = None if self._encoding else LineIndex(path, progress=progress)

    def __len__(self) -> int:
        """Number of lines that are not blank; 0 where the file is not UTF-8 at all."""
        return len(self._lines) if self._lines else 0

    def row_or_fault(self, index: int, /) -> RawRow | Fault:
        """The object on a line, or what is wrong with it.

        Raises:
            IndexError: there is no such row.
        """
        self.check_index(index, str(self.path))
        assert self._lines is not None
        place = f"{self.path}:{self._lines.line(index)}"
        start, end = self._lines.span(index)
        if end - start > self._max_line_bytes:
            return too_long(end - start, self._max_line_bytes, place)
        last = index == len(self) - 1 and self._lines.ends_open
        return parse_row(read_span(self.path, start, end), place, cut_off_at="the end of the file" if last else "")

    def faults(self) -> Iterator[Fault]:
        """The encoding, a byte order mark, line ends of Windows, no rows at all, a last line that is half-written."""
        if self._lines is None:
            assert self._encoding is not None
            yield self._encoding
            return
        if self._lines.has_bom:
            yield bom_fault(self.path)
        if self._lines.num_crlf:
            yield crlf_fault(self.path, self._lines.num_crlf)
        if not len(self):
            yield no_rows(self.path, "one JSON object per line")
        elif self._lines.ends_open and isinstance(fault := self.row_or_fault(len(self) - 1), Fault) and fault.code == "half-written":
            yield fault


class JsonArray(FaultyRows):
    """The elements of a JSON file that is one array, as LLaVA's are; only the element that is asked for is read and parsed.

    Args:
        path: the file.
        image_root: the folder to which media paths refer; default: the file's own.
        name: how tables and errors call it; default: the file's name without ending.
        max_row_bytes: a longer element is refused unread.
        progress: show how far the index is.

    Raises:
        RecordError: the file cannot be read, or its index cannot be written.
    """

    def __init__(
        self, path: Path, *, image_root: Path | None = None, name: str = "", max_row_bytes: int = MAX_ROW_BYTES, progress: Progress = False
    ) -> None:
        self.path, self.root, self.name = path, image_root or path.parent, name or path.stem
        self._max_row_bytes = max_row_bytes
        self._elements = ArrayIndex(path, progress=progress)

    def __len__(self) -> int:
        """Number of elements that are objects or arrays."""
        return len(self._elements)

    def row_or_fault(self, index: int, /) -> RawRow | Fault:
        """An element, or what is wrong with it.

        Raises:
            IndexError: there is no such row.
        """
        self.check_index(index, str(self.path))
        place = self._place(index)
        start, end = self._elements.span(index)
        if end - start > self._max_row_bytes:
            return too_long(end - start, self._max_row_bytes, place)
        data = read_span(self.path, start, end).strip(BLANK)
        last, closed = index == len(self) - 1, self._elements.is_closed
        if data.endswith(b",") and not (last and closed):
            data = data[:-1]
        elif not last:
            return Fault("json", place, "", "no comma after the element", "one is expected before the next", "Repair the file.")
        return parse_row(data, place, cut_off_at="" if closed else "the end of the file")

    def faults(self) -> Iterator[Fault]:
        """A byte order mark, line ends of Windows, no elements, an array that is cut off, text before or behind it."""
        if self._elements.has_bom:
            yield bom_fault(self.path)
        if self._elements.num_crlf:
            yield crlf_fault(self.path, self._elements.num_crlf)
        place, end = str(self.path), self._elements.end
        if self._elements.stray_head:
            found = f"{self._elements.stray_head!r} before the first object"
            yield Fault("json", place, "", found, "an array of objects is expected", "Write objects only.")
        if not len(self):
            yield no_rows(self.path, "an array of JSON objects")
        if not self._elements.is_closed:
            fault = self.row_or_fault(len(self) - 1) if len(self) else None
            if isinstance(fault, Fault):
                yield fault
            else:
                found, remedy = f"an array that the file's end, byte {end}, cuts off", "Write the file again, or end it with a ]."
                yield Fault("half-written", self._place(len(self) - 1) if len(self) else place, "", found, "a ] is expected", remedy)
        elif stray := self._elements.stray_tail:
            found = f"an array that ends at byte {end}, with {stray!r} behind it"
            remedy = "Look for a bracket or quote too many before that place, or write one object per line."
            yield Fault("json", f"{self.path}:{self._elements.end_line}", "", found, "nothing is expected there", remedy)

    def _place(self, index: int) -> str:
        line = self._elements.line(index)
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
    reason = f"{error.msg} at character {error.pos} of the row" if isinstance(error, json.JSONDecodeError) else str(error)
    return Fault("json", place, "", f"a row that is no JSON ({reason})", "one object is expected", "Repair or delete it.")


def _breaks_off(data: bytes, error: ValueError | RecursionError) -> bool:
    """Whether all is well up to the end: a string without end, a character cut in two, or nothing where something must follow."""
    if isinstance(error, UnicodeDecodeError):
        return error.end == len(data)
    if not isinstance(error, json.JSONDecodeError):
        return False
    rest = len(error.doc.rstrip()) - error.pos
    return rest <= len("false") or "Unterminated string" in error.msg or ("escape" in error.msg and rest <= len("\\uD83D"))


def encoding_fault(path: Path) -> Fault | None:
    """What is wrong with a text file's encoding as a whole: UTF-16 or UTF-32, by its mark or by its zero bytes.

    Raises:
        RecordError: the file cannot be read.
    """
    try:
        head = read_span(path, 0, _HEAD)
    except OSError as error:
        raise RecordError(f"a file that cannot be read ({error.strerror}) but records are needed ({path}). Check the path.") from error
    encoding = wide_encoding(head)
    if encoding is None:
        return None
    remedy = f"Convert it: iconv -f {encoding} -t UTF-8 {path.name} > utf8-{path.name}"
    return Fault("encoding", str(path), "", f"a file in {encoding}", "UTF-8 is expected", f"{remedy}.")


def wide_encoding(head: bytes) -> str | None:
    """The name of an encoding of two or four bytes per character, by a file's first bytes; None for others, and for no text at all."""
    marked = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)
    if marked or b"\0" not in head[:_HEAD]:
        return marked
    head = head[: min(len(head), _HEAD) // 4 * 4]
    zeros = [head[first::4].count(0) for first in range(4)]
    if max(zeros[:2]) + max(zeros[2:]) < len(head) // 4:  # not even half of the characters are Latin
        return None
    return "UTF-32" if sum(count * 8 > len(head) for count in zeros) > 2 else "UTF-16"


def bom_fault(path: Path) -> Fault:
    """A byte order mark, which is harmless here."""
    remedy = "It is passed over here, but trips other tools: save as UTF-8 without it."
    return Fault("bom", str(path), "", "a byte order mark at the start", "none is expected in UTF-8", remedy, "warning")


def crlf_fault(path: Path, number: int) -> Fault:
    """Line ends of Windows, which are harmless here."""
    found = f"{number} lines that end in CR LF"
    return Fault("crlf", str(path), "", found, "LF is expected", "They are read all the same; dos2unix changes them.", "warning")


def no_rows(path: Path, expected: str) -> Fault:
    """A file without rows, which is an error: a source that gives nothing cannot be meant."""
    return Fault("empty", str(path), "", "0 rows", f"{expected} is expected", "Fill the file or leave it out.")


def too_long(found: int, allowed: int, place: str) -> Fault:
    """A row that is refused unread."""
    remedy = "Keep images in files of their own; look for a missing line end or quote."
    return Fault("row-too-large", place, "", f"a row of {found} bytes", f"at most {allowed} are read", remedy)


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
