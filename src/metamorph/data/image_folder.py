"""A folder of images with a captions file: CSV, TSV or JSON lines, one row per image, as `metadata.csv` of Hugging Face's imagefolder.

The column that names the file may be called `file_name`, `filename`, `image` or `path`, the other `caption` or `text`; both are given on as
`image` and `caption`, beside what else the row has. Names are relative to the folder of the captions file. CSV has a header, and is indexed
like JSON lines, so that twelve million captions cost no memory.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from metamorph.data.faults import Fault
from metamorph.data.file_index import Progress
from metamorph.data.json_files import JsonLines
from metamorph.data.line_index import BOM, LineIndex
from metamorph.data.record_fields import FILE_NAMES
from metamorph.data.rows import FaultyRows, RawRow, no_rows
from metamorph.data.text_rows import TextRows

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"})
FILE_COLUMNS = (*FILE_NAMES, "image", "path")
CAPTION_COLUMNS = ("caption", "text")

_CONVERSATIONS = ("messages", "conversations")
_NAMES = ("metadata", "captions")
_DELIMITERS = (",", "\t", ";")
_COMPARED = 20_000
_PROBED = 20  # rows by which a file is told
_SHOWN = 3


class CsvLines(TextRows[LineIndex]):
    """The rows of a CSV or TSV file below its header, each a dict of texts. Arguments and errors: see `TextRows`."""

    def __len__(self) -> int:
        """Number of rows, without the header."""
        return max(0, super().__len__() - 1)

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns; none where there are no rows, or the header cannot be read."""
        return () if not len(self) or isinstance(self._header, Fault) else self._header.columns

    def row_or_fault(self, index: int, /) -> RawRow | Fault:
        """The values of a row by column, or what is wrong with it, or with the header.

        Raises:
            IndexError: there is no such row.
        """
        self.check_index(index, str(self.path))
        if isinstance(self._header, Fault):
            return self._header
        place = f"{self.path}:{self._index.line(index + 1)}"
        text = self._text(index + 1, place)
        values = text if isinstance(text, Fault) else _values(text, self._header.delimiter, place)
        if isinstance(values, Fault):
            return values
        if len(values) != len(self._header.columns):
            remedy = "Put values with a delimiter, quote or line end in double quotes, and double the quotes inside of them."
            expected = f"{len(self._header.columns)} are expected, as many as columns"
            return Fault("csv", place, "", f"{len(values)} values", expected, remedy)
        return RawRow(dict(zip(self._header.columns, values, strict=True)), place)

    @cached_property
    def _header(self) -> _Header | Fault:
        """The first row; only where there is one."""
        place = f"{self.path}:{self._index.line(0)}"
        text = self._text(0, place)
        if isinstance(text, Fault):
            return text
        try:
            delimiter = find_delimiter(text) or ","
        except csv.Error as error:
            return _no_csv(error, place)
        columns = _values(text, delimiter, place)
        return columns if isinstance(columns, Fault) else _Header(delimiter, columns)

    def _text(self, entry: int, place: str) -> str | Fault:
        data = self._read(entry, place)
        if isinstance(data, Fault):
            return data
        try:
            return data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            found = f"bytes that are not UTF-8 ({error.reason})"
            return Fault("encoding", place, "", found, "UTF-8 is expected", "Save the file as UTF-8.")

    def _open_index(self, progress: Progress) -> LineIndex:
        return LineIndex(self.path, quoted=True, progress=progress)

    def _faults(self) -> Iterator[Fault]:
        """A header that cannot be read or has columns of one name, no rows. Line ends of Windows are usual in CSV."""
        header = self._header if len(self._index) else _Header(",", [])
        if isinstance(header, Fault):
            yield header
            return
        if repeated := sorted({name for name in header.columns if header.columns.count(name) > 1}):
            found = f"the columns {', '.join(map(repr, repeated))} more than once"
            yield Fault("csv", f"{self.path}:1", "", found, "names that differ are expected", "Rename them.")
        if not len(self):
            yield no_rows(self.path, "a header and one row per image")


class _Header(NamedTuple):
    """What the first row says."""

    delimiter: str
    columns: list[str]


class CaptionedImages(FaultyRows):
    """Rows of a captions file, with `image` and `caption` beside the columns as they are called there.

    Args:
        rows: of the captions file.
        folder: in which it lies, and to which its names are relative.
        root: the folder to which the `image` of the result is relative; `folder` lies in it, or its own names are kept.
        whole: tell of images in the folder that no row names; off where it may hold those of other files too.
    """

    def __init__(self, rows: CsvLines | JsonLines, folder: Path, root: Path, *, whole: bool = True) -> None:
        self.rows, self.folder, self.root, self.name, self._whole = rows, folder, root, rows.name, whole
        self._below = PurePosixPath(folder.relative_to(root).as_posix()) if folder != root and folder.is_relative_to(root) else None

    def __len__(self) -> int:
        """Number of captions."""
        return len(self.rows)

    def row_or_fault(self, index: int, /) -> RawRow | Fault:
        """A row, its image relative to the root."""
        row = self.rows.row_or_fault(index)
        if isinstance(row, Fault):
            return row
        values = dict(row.values)
        column = next((name for name in FILE_COLUMNS if name in values), None)
        if column is not None:
            values["image"] = self._from_root(values[column])
        caption = next((name for name in CAPTION_COLUMNS if name in values), None)
        if caption is not None:
            values["caption"] = values[caption]
        return RawRow(values, row.place)

    def faults(self) -> Iterator[Fault]:
        """What is wrong with the captions file, and, of up to 20,000 rows, images of the folder that no row names."""
        yield from self.rows.faults()
        if not self._whole or len(self) > _COMPARED:  # all rows would have to be read, whenever the folder is opened
            return
        rows = list(map(self.row_or_fault, range(len(self))))
        if any(isinstance(row, Fault) for row in rows):  # which may be what names them; once it is repaired this is asked again
            return
        named = {os.path.normpath(str(row.values.get("image"))).casefold() for row in rows if isinstance(row, RawRow)}
        base = self.root if self._below is not None else self.folder
        there = (os.path.relpath(os.path.join(place, name), base) for place, _, names in os.walk(self.folder) for name in sorted(names))
        images = (name for name in there if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)
        missing = [name for name in images if os.path.normpath(name).casefold() not in named]  # of a wrong case, its row says
        if missing:
            found = f"{len(missing)} images that no row names ({', '.join(missing[:_SHOWN])}{', ...' if len(missing) > _SHOWN else ''})"
            expected, remedy = "each is expected in one", "Add rows for them, or leave it: they are not read."
            yield Fault("unlisted", str(self.rows.path), "", found, expected, remedy, "warning", media=True)

    def _from_root(self, image: object) -> object:
        if self._below is None or not isinstance(image, str) or image.startswith("/") or "://" in image:
            return image
        return str(self._below / image)


def holds_captions(rows: CsvLines | JsonLines) -> bool:
    """Whether the header, or the first row that tells, names an image and its caption, and no conversation."""
    if isinstance(rows, CsvLines):
        return _tells(rows.columns) or False
    first = map(rows.row_or_fault, range(min(len(rows), _PROBED)))
    told = (_tells(row.values) for row in first if isinstance(row, RawRow))
    return next((one for one in told if one is not None), False)


def find_captions(files: Sequence[Path]) -> list[Path]:
    """Those of a folder's text files that are its captions by name; none, where no name says so."""
    return [file for file in files if file.stem.lower() in _NAMES]


def find_delimiter(header: str) -> str | None:
    """What separates the columns of a header, if it is one: several names, none of them empty but that of pandas' numbers of rows."""
    read = {delimiter: next(csv.reader(io.StringIO(header, newline=""), delimiter=delimiter), []) for delimiter in _DELIMITERS}
    likely = [delimiter for delimiter, columns in read.items() if len(columns) > 1 and all(map(str.strip, columns[len(columns) > 2 :]))]
    return next((delimiter for delimiter in likely if _has_both(read[delimiter])), likely[0] if likely else None)


def looks_like_csv(head: bytes) -> bool:
    """Whether the first bytes of a file are a header and rows, of which some may be broken: of captions, or mostly of as many values."""
    lines = head.removeprefix(BOM).decode("utf-8", "replace").rstrip("\r\n").splitlines()
    if not lines or b"\0" in head or (delimiter := find_delimiter(lines[0])) is None:
        return False
    columns, *rows = islice(filter(None, csv.reader(io.StringIO("\n".join(lines), newline=""), delimiter=delimiter)), 1 + _PROBED)
    return _has_both(columns) or 2 * sum(len(row) == len(columns) for row in rows) >= max(1, len(rows))


def _tells(columns: Collection[str]) -> bool | None:
    """Whether a row of these columns is a caption; None where they say neither that nor that it is a conversation."""
    if any(name in columns for name in _CONVERSATIONS):
        return False
    return True if _has_both(columns) else None


def _has_both(columns: Collection[str]) -> bool:
    return any(name in columns for name in FILE_COLUMNS) and any(name in columns for name in CAPTION_COLUMNS)


def _values(text: str, delimiter: str, place: str) -> list[str] | Fault:
    """The values of one row, strictly."""
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        return _no_csv(error, place)
    if len(rows) != 1:
        found, remedy = f"{len(rows)} rows between carriage returns", "Put values that have one in double quotes, or end lines in LF."
        return Fault("csv", place, "", found, "one row a line is expected", remedy)
    return rows[0]


def _no_csv(error: csv.Error, place: str) -> Fault:
    """Why a row is none. The csv module's limit on a value holds for the whole process, so it is named, not raised."""
    if "field limit" in str(error):
        found, expected = f"a value of more than {csv.field_size_limit()} characters", "captions are shorter"
        remedy = "Look for a double quote that is not closed, here or on the lines below; write longer texts as JSON lines."
        return Fault("csv", place, "", found, expected, remedy)
    if "end of data" in str(error):
        remedy = "Close it, or double it where it belongs to the text."
        return Fault("csv", place, "", "a double quote that is not closed", "one row is expected", remedy)
    return Fault("csv", place, "", f"a row that is no CSV ({error})", "one row is expected", "Double each quote inside of quotes.")
