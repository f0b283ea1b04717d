"""Finding the lines of a text file at the speed of the disk: one pass over its bytes, a few numpy operations per chunk, constant memory.

Blank lines hold no row. What is kept per row is the offset of its line, 8 bytes; line numbers follow from the rows and the few blank lines.
With `quoted`, a line end between double quotes belongs to a value, as in CSV, and line numbers are kept beside the offsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Bool, Int64

from metamorph.data.file_index import IndexWriter, Notes, Progress, Scan, open_index

CHUNK = 2**20
"""Bytes read at a time: small enough for what is computed from them to stay in the processor's cache."""

BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"
_NEWLINE, _RETURN, _SPACE, _QUOTE = 10, 13, 32, 34


class RowIndex:
    """Where the rows of a text file lie, whatever tells them apart.

    Args:
        file: the file.
        kind: how it is scanned.
        scan: does it, where there is no index yet; tells of a byte order mark as `bom`, and of line ends of Windows as `crlf`.
        progress: show how far the scan is.

    Raises:
        RecordError: the file cannot be read, or its index cannot be written.
    """

    def __init__(self, file: Path, kind: str, scan: Scan, progress: Progress) -> None:
        self._index = open_index(file, kind, scan, progress=progress)

    def __len__(self) -> int:
        """Number of rows."""
        return max(0, self._index.count("starts") - 1)

    @property
    def location(self) -> Path:
        """The index on disk."""
        return self._index.location

    @property
    def has_bom(self) -> bool:
        """The file begins with a byte order mark, which belongs to no row."""
        return self._index.notes["bom"]

    @property
    def num_crlf(self) -> int:
        """Lines that end in CR LF."""
        return self._index.notes["crlf"]

    def span(self, row: int) -> tuple[int, int]:
        """First byte of a row and of what follows its last; what lies before the next row is included."""
        starts = self._index.section("starts")
        return int(starts[row]), int(starts[row + 1])


class LineIndex(RowIndex):
    """Where the lines of a text file lie that are not blank; a line reaches over the blank ones behind it.

    Args:
        file: the file.
        quoted: line ends between double quotes do not count.
        progress: show how far the scan is.

    Raises:
        RecordError: the file cannot be read, or its index cannot be written.
    """

    def __init__(self, file: Path, *, quoted: bool = False, progress: Progress = False) -> None:
        super().__init__(file, "quoted lines" if quoted else "lines", partial(_scan, quoted=quoted), progress)
        self._quoted = quoted

    @property
    def ends_open(self) -> bool:
        """No line end follows the last row."""
        return self._index.notes["open"]

    def line(self, row: int) -> int:
        """The number, from 1, of the line on which a row begins."""
        if self._quoted:
            return int(self._index.section("lines")[row]) + 1
        return row + 1 + int(np.searchsorted(self._index.section("blank"), row, side="right"))


def read_span(file: Path, start: int, end: int) -> bytes:
    """Some bytes of a file; opened for each reading, which costs microseconds and leaves nothing open in any process."""
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        return opened.read(end - start)


def chunks(file: BinaryIO, size: int = CHUNK) -> Iterator[memoryview]:
    """A file from where it stands, in pieces that are overwritten by the next one."""
    buffer = memoryview(bytearray(size))
    while number := file.readinto(buffer):  # pyright: ignore[reportAttributeAccessIssue]  # every binary file has it
        yield buffer[:number]


def _scan(file: BinaryIO, writer: IndexWriter, *, quoted: bool) -> Notes:
    bom = file.read(len(BOM)) == BOM
    offset = len(BOM) if bom else 0
    file.seek(offset)
    lines = _Lines(offset, quoted)
    for chunk in chunks(file):
        writer.stream(lines.take(chunk, offset))
        offset += len(chunk)
        writer.advance(len(chunk))
    writer.stream(lines.finish(offset))
    writer.add("blank", np.concatenate([np.zeros(0, np.int64), *lines.blank]))
    if quoted:
        writer.add("lines", np.concatenate([np.zeros(0, np.int64), *lines.numbers]))
    return {"bom": bom, "crlf": lines.crlf, "open": lines.ends_open}


class _Lines:
    """What is known between two chunks."""

    def __init__(self, offset: int, quoted: bool) -> None:
        self.crlf, self.ends_open, self.blank, self.numbers = 0, False, [], []
        self._start, self._all_blank = offset, True  # of the line that is being read
        self._quoted, self._inside = quoted, 0
        self._rows, self._newlines, self._line = 0, 0, 0  # line: on which the present row begins
        self._last = _NEWLINE

    def take(self, chunk: memoryview, offset: int) -> Int64[np.ndarray, " n"]:
        """The offsets of the rows that end in this chunk."""
        data = np.frombuffer(chunk, dtype=np.uint8)
        newlines = ends = np.flatnonzero(data == _NEWLINE)
        if self._quoted:
            ends = self._outside(data, ends)
        before, self._last = self._last, int(data[-1])
        if not len(ends):
            self._newlines += len(newlines)
            self._all_blank = self._all_blank and not bytes(chunk).strip(BLANK)
            return ends
        self.crlf += int((data[ends[ends > 0] - 1] == _RETURN).sum()) + int(ends[0] == 0 and before == _RETURN)
        starts = np.concatenate([[0], ends[:-1] + 1])
        filled = _filled(data, chunk, starts, ends)
        filled[0] |= not self._all_blank
        starts += offset
        starts[0] = self._start
        self._number(filled, newlines, ends)
        self._start, rest = offset + int(ends[-1]) + 1, bytes(chunk[int(ends[-1]) + 1 :])
        self._all_blank = not rest.strip(BLANK)
        return starts[filled]

    def finish(self, end: int) -> Int64[np.ndarray, " n"]:
        """The offset of a row that no line end follows, if there is one, and the end of the file."""
        self.ends_open = not self._all_blank
        if self.ends_open and self._quoted:
            self.numbers.append(np.array([self._line], dtype=np.int64))
        return np.array([self._start, end] if self.ends_open else [end], dtype=np.int64)

    def _number(self, filled: Bool[np.ndarray, " n"], newlines: Int64[np.ndarray, " m"], ends: Int64[np.ndarray, " n"]) -> None:
        """Keep what line numbers need: the rows before each blank line, or the line of each row."""
        rows = np.cumsum(filled)
        if not filled.all():
            self.blank.append((self._rows + rows)[~filled])
        self._rows += int(rows[-1])
        if self._quoted:
            following = self._newlines + np.searchsorted(newlines, ends, side="right")  # the line on which the next row begins
            self.numbers.append(np.concatenate([[self._line], following[:-1]])[filled])
            self._line = int(following[-1])
        self._newlines += len(newlines)

    def _outside(self, data: np.ndarray, ends: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " k"]:
        """The line ends that have an even number of quotes before them; a quote in a value is doubled, which changes nothing."""
        quotes = np.flatnonzero(data == _QUOTE)
        inside = (np.searchsorted(quotes, ends) + self._inside) & 1
        self._inside = (self._inside + len(quotes)) & 1
        return ends[inside == 0]


def _filled(data: np.ndarray, chunk: memoryview, starts: Int64[np.ndarray, " n"], ends: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Which lines hold more than white space: decided by the first byte of almost all."""
    first = data[starts]  # of an empty line: its end
    filled = first > _SPACE
    for line in np.flatnonzero(~filled & (starts < ends)):
        filled[line] = bool(bytes(chunk[starts[line] : ends[line]]).strip(BLANK))
    return filled
