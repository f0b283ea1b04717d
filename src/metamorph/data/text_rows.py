"""Rows of text files, found by an index and read one at a time: what JSON lines, JSON arrays and CSV have in common."""

from __future__ import annotations

import codecs
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar

from metamorph.data.faults import Fault
from metamorph.data.file_index import Progress
from metamorph.data.line_index import RowIndex, read_span
from metamorph.data.rows import FaultyRows
from metamorph.errors import RecordError

Index = TypeVar("Index", bound=RowIndex)

MAX_ROW_BYTES = 2**26
"""A longer row is refused unread: nobody writes 64 MiB of conversation, but many a broken file has one endless line."""

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_HEAD = 4096


class TextRows(FaultyRows, Generic[Index]):
    """The rows of a text file. Threads and processes may share it.

    Args:
        path: the file.
        image_root: the folder to which media paths refer; default: the file's own.
        name: how tables and errors call it; default: the file's name without ending.
        max_row_bytes: a longer row is refused unread.
        progress: show how far the index is.

    Raises:
        RecordError: the file cannot be read, or its index cannot be written.
    """

    _index: Index  # not there where the encoding is at fault: the file has no rows then

    def __init__(
        self, path: Path, *, image_root: Path | None = None, name: str = "", max_row_bytes: int = MAX_ROW_BYTES, progress: Progress = False
    ) -> None:
        self.path, self.root, self.name = path, image_root or path.parent, name or path.stem
        self._max_row_bytes = max_row_bytes
        self._encoding = encoding_fault(path)
        if self._encoding is None:
            self._index = self._open_index(progress)

    def __len__(self) -> int:
        """Number of rows; 0 where the file is not UTF-8 at all."""
        return 0 if self._encoding else len(self._index)

    def faults(self) -> Iterator[Fault]:
        """What is wrong with the file as a whole: its encoding, a byte order mark, and what files of its kind can have."""
        if self._encoding is not None:
            yield self._encoding
            return
        if self._index.has_bom:
            remedy = "It is passed over here, but trips other tools: save as UTF-8 without it."
            yield Fault("bom", str(self.path), "", "a byte order mark at the start", "none is expected in UTF-8", remedy, "warning")
        yield from self._faults()

    @abstractmethod
    def _open_index(self, progress: Progress) -> Index:
        """Where the rows are."""

    @abstractmethod
    def _faults(self) -> Iterator[Fault]:
        """What is wrong with the file beside its encoding."""

    def _read(self, entry: int, place: str) -> bytes | Fault:
        """The bytes of an entry of the index."""
        start, end = self._index.span(entry)
        if end - start > self._max_row_bytes:
            found, expected = f"a row of {end - start} bytes", f"at most {self._max_row_bytes} are read"
            remedy = "Keep images in files of their own; look for a missing line end or quote."
            return Fault("row-too-large", place, "", found, expected, remedy)
        return read_span(self.path, start, end)

    def _line_ends(self) -> Iterator[Fault]:
        """Line ends of Windows, which are harmless here."""
        if number := self._index.num_crlf:
            found, remedy = f"{number} lines that end in CR LF", "They are read all the same; dos2unix changes them."
            yield Fault("crlf", str(self.path), "", found, "LF is expected", remedy, "warning")


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
