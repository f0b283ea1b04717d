"""A folder of images with a captions file: CSV, TSV or JSON lines, one row per image, as `metadata.csv` of Hugging Face's imagefolder.

The column that names the file may be called `file_name`, `image` or `path`, the other `caption` or `text`; both are given on as `image` and
`caption`, beside what else the row has. Names are relative to the folder of the captions file. CSV has a header, and is indexed like JSON
lines, so that twelve million captions cost no memory.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from metamorph.data.faults import Fault
from metamorph.data.file_index import Progress
from metamorph.data.json_files import MAX_ROW_BYTES, JsonLines, bom_fault, encoding_fault, no_rows, too_long
from metamorph.data.line_index import BOM, LineIndex, read_span
from metamorph.data.rows import FaultyRows, RawRow

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"})
FILE_COLUMNS = ("file_name", "image", "path")
CAPTION_COLUMNS = ("caption", "text")

_CONVERSATIONS = ("messages", "conversations")
_NAMES = ("metadata", "captions")
_DELIMITERS = (",", "\t", ";")
_COMPARED = 20_000
_SHOWN = 3


class CsvLines(FaultyRows):
    """The rows of a CSV or TSV file below its header, each a dict of texts.

    Args:
        path: the file.
        image_root: the folder to which media paths refer; default: the file's own.
        name: how tables and errors call it; default: the file's name without ending.
        progress: show how far the index is.

    Raises:
        RecordError: the file cannot be read, or its index cannot be written.
    """

    def __init__(self, path: Path, *, image_root: Path | None = None, name: str = "", progress: Progress = False) -> None:
        self.path, self.root, self.name = path, image_root or path.parent, name or path.stem
        self._encoding = encoding_fault(path)
        self._lines = None if self._encoding else LineIndex(path, quoted=True, progress=progress)
        self._delimiter, self._columns = ",", list[str]()
        if self._lines:
            header = _decode(read_span(path, *self._lines.span(0))) if len(self._lines) else ""
            self._delimiter = find_delimiter(header) or ","
            self._columns = next(csv.reader([header], delimiter=self._delimiter), [])

    def __len__(self) -> int:
        """Number of rows, without the header."""
        return max(0, len(self._lines) - 1) if self._lines else 0

    def row_or_fault(self, index: int, /) -> RawRow | Fault:
        """The values of a row by column, or what is wrong with it.

        Raises:
            IndexError: there is no such row.
        """
        self.check_index(index, str(self.path))
        assert self._lines is not None
        place = f"{self.path}:{self._lines.line(index + 1)}"
        start, end = self._lines.span(index + 1)
        if end - start > MAX_ROW_BYTES:
            return too_long(end - start, MAX_ROW_BYTES, place)
        try:
            text = read_span(self.path, start, end).decode("utf-8").rstrip("\r\n")
            rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter, strict=True))
        except UnicodeDecodeError as error:
            return Fault(
                "encoding", place, "", f"bytes that are not UTF-8 ({error.reason})", "UTF-8 is expected", "Save the file as UTF-8."
            )
        except csv.Error as error:
            return Fault("csv", place, "", f"a row that is no CSV ({error})", "one row is expected", "Double each quote inside of quotes.")
        if len(rows) != 1 or len(rows[0]) != len(self._columns):
            found = f"{sum(map(len, rows))} values"
            remedy = "Put values with a delimiter, quote or line end in double quotes, and double the quotes inside of them."
            return Fault("csv", place, "", found, f"{len(self._columns)} are expected, as many as columns", remedy)
        return RawRow(dict(zip(self._columns, rows[0], strict=True)), place)

    def faults(self) -> Iterator[Fault]:
        """The encoding, a byte order mark, columns of one name, no rows. Line ends of Windows are usual in CSV."""
        if self._lines is None:
            assert self._encoding is not None
            yield self._encoding
            return
        if self._lines.has_bom:
            yield bom_fault(self.path)
        if repeated := sorted({name for name in self._columns if self._columns.count(name) > 1}):
            found = f"the columns {', '.join(map(repr, repeated))} more than once"
            yield Fault("csv", f"{self.path}:1", "", found, "names that differ are expected", "Rename them.")
        if not len(self):
            yield no_rows(self.path, "a header and one row per image")


class CaptionedImages(FaultyRows):
    """Rows of a captions file, with `image` and `caption` beside the columns as they are called there.

    Args:
        rows: of the captions file.
        folder: in which it lies, and to which its names are relative.
        root: the folder to which the `image` of the result is relative; `folder` lies in it, or its own names are kept.
    """

    def __init__(self, rows: CsvLines | JsonLines, folder: Path, root: Path) -> None:
        self.rows, self.folder, self.root, self.name = rows, folder, root, rows.name
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
        if len(self) > _COMPARED:  # all rows would have to be read, whenever the folder is opened
            return
        named = {
            os.path.normpath(str(row.values.get("image"))).casefold()
            for row in map(self.row_or_fault, range(len(self)))
            if isinstance(row, RawRow)
        }
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
    """Whether the first row names an image and its caption, and is no conversation."""
    row = rows.row_or_fault(0) if len(rows) else None
    return isinstance(row, RawRow) and _has_both(row.values) and not any(name in row.values for name in _CONVERSATIONS)


def find_captions(files: Sequence[Path]) -> list[Path]:
    """Those of a folder's text files that are its captions by name; none, where no name says so."""
    return [file for file in files if file.stem.lower() in _NAMES]


def find_delimiter(header: str) -> str | None:
    """What separates the columns of a header, if it is one: several names, none of them empty."""
    read = {delimiter: next(csv.reader([header], delimiter=delimiter), []) for delimiter in _DELIMITERS}
    likely = [delimiter for delimiter, columns in read.items() if len(columns) > 1 and all(map(str.strip, columns))]
    return next((delimiter for delimiter in likely if _has_both(read[delimiter])), likely[0] if likely else None)


def looks_like_csv(head: bytes) -> bool:
    """Whether the first bytes of a file are a header and a row of as many values."""
    lines = _decode(head).splitlines()
    if len(lines) < 2 or b"\0" in head or (delimiter := find_delimiter(lines[0])) is None:
        return False
    rows = csv.reader(io.StringIO("\n".join(lines), newline=""), delimiter=delimiter)
    return len(next(rows)) == len(next(rows, []))


def _has_both(columns: Sequence[str] | object) -> bool:
    return any(name in columns for name in FILE_COLUMNS) and any(name in columns for name in CAPTION_COLUMNS)  # pyright: ignore[reportOperatorIssue]


def _decode(data: bytes) -> str:
    return data.removeprefix(BOM).decode("utf-8", "replace").rstrip("\r\n")
