"""What was found in many rows, without their texts: about 100 bytes a row, added up in the order of rows."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64

from metamorph.data.faults import Fault
from metamorph.data.row_checks import RowFindings, digest


def _numbers() -> array[int]:
    return array("q")


@dataclass
class Findings:
    """Counts and hashes. The arrays hold several numbers for each entry, one after the other; `table` gives them as rows."""

    rows: int = 0
    faults: list[tuple[int, Fault]] = field(default_factory=list)  # with the row
    kinds: Counter[str] = field(default_factory=Counter)
    images_per_row: Counter[int] = field(default_factory=Counter)
    readable: int = 0  # rows whose fields could be read, whatever they say
    columns: dict[str, None] = field(default_factory=dict)  # names of fields, in the order in which they are met
    shapes: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)  # field and how it is written -> first row, rows
    letters: array[int] = field(default_factory=_numbers)  # characters
    lengths: array[int] = field(default_factory=_numbers)  # positions, text targets, visual targets
    ids: array[int] = field(default_factory=_numbers)  # hash, row
    contents: array[int] = field(default_factory=_numbers)  # hash, row
    images: array[int] = field(default_factory=_numbers)  # hash of the file, hash of the name, row

    def add(self, index: int, row: RowFindings) -> None:
        """One row more."""
        self.rows += 1
        self.faults += [(index, fault) for fault in row.faults]
        self.readable += bool(row.columns)
        self.columns.update(dict.fromkeys(row.columns))
        for shape in row.shapes:
            self._add_shape(shape, index, 1)
        if row.content:
            self.contents.extend((row.content, index))
        for image in row.images:
            if image.content and image.name:
                self.images.extend((image.content, digest(image.name.encode(errors="replace")), index))
        if row.example is None:
            return
        if row.id:
            self.ids.extend((digest(row.id.encode(errors="replace")), index))
        self.kinds[row.example.kind or "unnamed"] += 1
        self.images_per_row[sum(len(message.images) for message in row.example.messages)] += 1
        self.letters.append(row.letters)
        if row.lengths is not None:
            self.lengths.extend((row.lengths.positions, row.lengths.num_text_targets, row.lengths.num_visual_targets))

    def merge(self, later: Findings) -> None:
        """Those of later rows."""
        self.rows += later.rows
        self.faults += later.faults
        self.readable += later.readable
        self.columns.update(later.columns)
        self.kinds.update(later.kinds)
        self.images_per_row.update(later.images_per_row)
        for shape, (first, count) in later.shapes.items():
            self._add_shape(shape, first, count)
        for name in ("letters", "lengths", "ids", "contents", "images"):
            getattr(self, name).extend(getattr(later, name))

    def table(self, name: str, width: int) -> Int64[np.ndarray, "m {width}"]:
        """An array as rows of `width` numbers."""
        return np.array(getattr(self, name), dtype=np.int64).reshape(-1, width)

    def _add_shape(self, shape: tuple[str, str], index: int, count: int) -> None:
        first, before = self.shapes.get(shape, (index, 0))
        self.shapes[shape] = (first, before + count)
