"""What only several rows together show: ids given twice, rows that repeat, one image under two names, fields of changing type.

Rows are compared by hashes of 64 bits, kept in arrays: 16 bytes a row, 24 an image. Only what seems to repeat is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from jaxtyping import Int64

from metamorph.data.faults import Fault
from metamorph.data.record_fields import CAPTIONS, nearest_column
from metamorph.data.row_checks import RowFindings, digest

Found = tuple[int, Fault]
"""A fault and the row to which it belongs."""


@dataclass(frozen=True)
class Shape:
    """How a field is written, by the first row that does so, and how many do."""

    field: str
    kind: str
    first: int
    count: int


def repeats(pairs: Int64[np.ndarray, "m 2"]) -> Iterator[tuple[int, int]]:
    """(row, an earlier row with the same hash) for (hash, row) pairs, in the order of rows."""
    ordered = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    same = ordered[1:, 0] == ordered[:-1, 0]
    again = np.flatnonzero(same) + 1
    begins = np.ones(len(ordered), dtype=bool)
    begins[again] = False
    starts = np.maximum.accumulate(np.where(begins, np.arange(len(ordered)), 0))
    found = np.stack([ordered[again, 1], ordered[starts[again], 1]], axis=1)
    yield from ((int(row), int(first)) for row, first in found[np.argsort(found[:, 0], kind="stable")])


def repeated_rows(contents: Int64[np.ndarray, "m 2"], read: Callable[[int], RowFindings]) -> Iterator[Found]:
    """Rows that say what an earlier row says."""
    for row, first in repeats(contents):
        found, earlier = read(row), read(first)
        if found.content == earlier.content:
            said = f"the same as {earlier.place}"
            yield row, Fault("row-duplicate", found.place, "", said, "each row is expected once", "Drop one of the two.", "warning")


def repeated_ids(ids: Int64[np.ndarray, "m 2"], read: Callable[[int], RowFindings], known: set[int]) -> Iterator[Found]:
    """Ids given to different rows; `known` rows are repeated as a whole and reported already."""
    for row, first in repeats(ids):
        if row in known:
            continue
        found, earlier = read(row), read(first)
        if found.id == earlier.id:
            said, remedy = (
                f"id {found.id!r}, which {earlier.place} has too",
                "Number the rows anew; reports and resumed runs name rows by id.",
            )
            yield row, Fault("id-duplicate", found.place, "id", said, "an id of its own is expected", remedy, "warning")


def renamed_images(images: Int64[np.ndarray, "m 3"], read: Callable[[int], RowFindings]) -> Iterator[Found]:
    """Images whose files are the same under another name, each name once; of (content, hash of the name, row) triples."""
    ordered = images[np.lexsort((images[:, 2], images[:, 0]))]
    bounds = np.flatnonzero(np.diff(ordered[:, 0], prepend=ordered[:1, 0] + 1)) if len(ordered) else np.zeros(0, int)
    for group in np.split(ordered, bounds[1:]):
        if len(group) < 2 or (group[:, 1] == group[0, 1]).all():
            continue
        names, place = {int(group[0, 1])}, (_named(read, group[0]), read(int(group[0, 2])).place)
        for entry in group[1:]:
            if int(entry[1]) not in names:
                names.add(int(entry[1]))
                yield int(entry[2]), _renamed(read, entry, *place)


def _named(read: Callable[[int], RowFindings], entry: Int64[np.ndarray, " 3"]) -> str:
    return next((image.name for image in read(int(entry[2])).images if digest(image.name.encode()) == int(entry[1])), "")


def _renamed(read: Callable[[int], RowFindings], entry: Int64[np.ndarray, " 3"], first: str, place: str) -> Fault:
    found = read(int(entry[2]))
    name = _named(read, entry)
    where = next((image.field for image in found.images if image.name == name), "")
    said = f"{name!r}, the same file as {first!r} ({place})"
    remedy = "Name one of them in both rows; training and validation may share it unseen otherwise."
    return Fault("image-duplicate", found.place, where, said, "one name for one image is expected", remedy, "warning", media=True)


def changing_fields(shapes: list[Shape], place: Callable[[int], str]) -> Iterator[Found]:
    """Fields that are text in some rows and lists in others, with the first row that differs from the rows before it."""
    ordered = sorted(shapes, key=lambda shape: (shape.field, shape.first))
    for name, group in groupby(ordered, key=lambda shape: shape.field):
        first, *others = group
        for other in others:
            rows = f"{other.count} row{'' if other.count == 1 else 's'}"
            said = f"{other.kind} in {rows}, here first, and {first.kind} in {first.count}, first at {place(first.first)}"
            expected = "one type is expected in all rows"
            remedy = "It is read as it is, but Parquet and Hugging Face datasets hold one type in a column: write a list in all."
            yield other.first, Fault("field-changes-type", place(other.first), name, said, expected, remedy, "warning")


ABSENT = ("too-few-media", "image-missing", "format-unknown")
"""What rows say of themselves where the whole file lacks a column."""


def unknown_columns(columns: Mapping[str, str], seen: Sequence[str], rows: int, place: str) -> Iterator[Fault]:
    """Columns that a mapping names and none of the rows has.

    Args:
        columns: our name of a field -> its name in the file.
        seen: names of fields in the rows that could be read.
        rows: how many those are.
        place: the file.
    """
    for ours, theirs in columns.items():
        if rows and theirs not in seen:
            found, expected = f"{theirs!r} in none of {rows} rows read", f"a column for {ours} is expected, beside {', '.join(seen)}"
            yield Fault("column-unknown", place, ours, found, expected, nearest_column(theirs, seen))


def absent_column(faults: list[Found], shapes: list[Shape], rows: int, place: str, columns: Sequence[str]) -> Fault | None:
    """One fault of the file for those of its rows, where none of several rows has a field of media but most ask for one.

    Args:
        faults: of the rows.
        shapes: fields of media that some row has.
        rows: how many were read.
        place: the file.
        columns: what the rows have instead.
    """
    asking = {row for row, fault in faults if fault.code in ABSENT}
    if shapes or rows < 2 or 2 * len(asking) < rows or not set(columns):  # of a few rows each says so for itself
        return None
    found = f"only the fields {', '.join(columns)}"
    if any(fault.code == "too-few-media" for _, fault in faults):
        expected = f"{len(asking)} of {rows} rows read have an <image> or <video>, and it must be in a column"
    elif any(name in CAPTIONS for name in columns) and len(asking) == rows:
        expected = "an image is needed for each caption"
    else:
        return None
    return Fault("column-missing", place, "image", found, expected, "Write the column again, or name it: --columns image=ITS_NAME.")
