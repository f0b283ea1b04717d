"""Finding the elements of a JSON array without parsing it: quotes and escapes tell strings from structure, brackets tell how deep.

One pass, a few numpy operations per chunk. An element is an object or array directly inside the outermost array. What lies between the
start of one and the start of the next is its row, so that whatever is wrong in between makes that row unreadable instead of vanishing.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Bool, Int64

from metamorph.data.file_index import IndexWriter, Notes, Progress
from metamorph.data.line_index import BLANK, BOM, CHUNK, RowIndex

_NEWLINE, _RETURN, _QUOTE, _BACKSLASH = 10, 13, 34, 92
_OPEN, _CLOSE, _CASE = 0x5B, 0x5D, 0x20  # [ and ]; with the bit that tells cases apart set: { and }
_SHOWN = 40  # bytes of stray text that errors quote


class ArrayIndex(RowIndex):
    """Where the elements of an array lie that are objects or arrays; the comma and white space behind one are part of its span.

    Args:
        file: the file; its first byte after white space is `[`.
        progress: show how far the scan is.

    Raises:
        RecordError: the file cannot be read, or its index cannot be written.
    """

    def __init__(self, file: Path, *, progress: Progress = False) -> None:
        super().__init__(file, "array", _scan, progress)

    @property
    def is_closed(self) -> bool:
        """The file reaches the array's last bracket."""
        return self._index.notes["closed"]

    @property
    def end(self) -> int:
        """Offset of the last bracket, or of the end of the file."""
        return self._index.notes["end"]

    @property
    def end_line(self) -> int:
        """The number, from 1, of the line of `end`."""
        return self._index.notes["end_line"]

    @property
    def stray_head(self) -> str:
        """What stands between the first bracket and the first element, from its first letter on; it should be nothing."""
        return self._index.notes["head"]

    @property
    def stray_tail(self) -> str:
        """What follows the array."""
        return self._index.notes["tail"]

    def line(self, row: int) -> int | None:
        """The number, from 1, of the line on which an element begins; None where lines do not tell elements apart."""
        return int(self._index.section("lines")[row]) + 1 if self._index.count("lines") else None


def _scan(file: BinaryIO, writer: IndexWriter) -> Notes:
    scan = _Structure()
    begin, scan.newlines = _find_begin(file)
    scan.offset = begin
    file.seek(begin)
    while scan.end is None and (chunk := _read(file)):
        writer.stream(scan.take(chunk))
        writer.advance(len(chunk))
    size = file.seek(0, 2)
    closed = scan.end is not None
    end = size if scan.end is None else scan.end
    writer.stream(np.array([end], dtype=np.int64))
    rows = sum(len(lines) for lines in scan.lines)
    if scan.newlines >= rows > 1:
        writer.add("lines", np.concatenate(scan.lines))
    tail = _stray(file, end + 1, size)
    first = scan.first if scan.first is not None else end
    file.seek(0)
    bom = file.read(3) == BOM
    notes = {"bom": bom, "crlf": scan.crlf, "closed": closed, "end": end, "end_line": scan.newlines + 1}
    return {**notes, "head": _stray(file, begin + 1, first), "tail": tail}


def _find_begin(file: BinaryIO) -> tuple[int, int]:
    """Offset of the first bracket, after a byte order mark and white space (as far as 64 KiB), and the line ends before it."""
    head = file.read(2**16)
    mark = len(BOM) if head.startswith(BOM) else 0
    begin = len(head) - len(head[mark:].lstrip(BLANK))
    return begin, head.count(b"\n", 0, begin)


def _read(file: BinaryIO) -> bytes:
    """The next piece, which never ends between a backslash and what it escapes."""
    pieces = [file.read(CHUNK)]
    while pieces[-1].endswith(b"\\"):
        pieces.append(file.read(CHUNK))
    return b"".join(pieces)


def _stray(file: BinaryIO, start: int, end: int) -> str:
    """The first of some bytes that are not white space."""
    file.seek(start)
    while start < end and (data := file.read(min(CHUNK, end - start))):
        if text := data.lstrip(BLANK):
            return text[:_SHOWN].decode("utf-8", "replace")
        start += len(data)
    return ""


class _Structure:
    """What is known between two chunks."""

    def __init__(self) -> None:
        self.offset, self.newlines, self.crlf = 0, 0, 0
        self.first: int | None = None  # offset of the first element
        self.end: int | None = None  # offset of the bracket that closes the array
        self.lines: list[Int64[np.ndarray, " n"]] = []
        self._depth, self._in_string = 0, False

    def take(self, chunk: bytes) -> Int64[np.ndarray, " n"]:
        """The offsets of the elements that begin in this chunk; stops where the array ends."""
        data = np.frombuffer(chunk, dtype=np.uint8)
        quotes = _unescaped(data, np.flatnonzero(data == _QUOTE))
        places, opens = _brackets(data)
        outside = ((np.searchsorted(quotes, places) + self._in_string) & 1) == 0
        places, opens = places[outside], opens[outside]
        depth = self._depth + np.cumsum(np.where(opens, 1, -1))  # after each bracket
        closing = np.flatnonzero(depth <= 0)
        stop = int(closing[0]) if len(closing) else len(places)
        starts = places[:stop][opens[:stop] & (depth[:stop] == 2)]
        newlines = np.flatnonzero(data == _NEWLINE)
        if stop < len(places):
            self.end = self.offset + int(places[stop])
            newlines = newlines[newlines < places[stop]]
        self.crlf += int((data[newlines[newlines > 0] - 1] == _RETURN).sum())
        self.lines.append(self.newlines + np.searchsorted(newlines, starts))
        self.newlines += len(newlines)
        self._depth = int(depth[-1]) if len(depth) else self._depth
        self._in_string ^= bool(len(quotes) & 1)
        starts = starts + self.offset
        self.offset += len(chunk)
        if self.first is None and len(starts):
            self.first = int(starts[0])
        return starts


def _brackets(data: np.ndarray) -> tuple[Int64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Where brackets and braces are, and which of them open."""
    places = np.flatnonzero((data | 0x26) == 0x7F)  # those four, and Y, y, _ and DEL: one pass instead of four, then a few are dropped
    kinds = data[places] & ~np.uint8(_CASE)
    opens = kinds == _OPEN
    real = opens | (kinds == _CLOSE)
    return places[real], opens[real]


def _unescaped(data: np.ndarray, quotes: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " m"]:
    """The quotes that begin or end a string: those after an even number of backslashes."""
    before = (quotes > 0) & (data[quotes - 1] == _BACKSLASH)
    run, active = before.astype(np.int64), np.flatnonzero(before)
    while len(active):  # almost always once: longer runs are rare
        further = quotes[active] - run[active] - 1
        active = active[(further >= 0) & (data[further] == _BACKSLASH)]
        run[active] += 1
    return quotes[run % 2 == 0]
