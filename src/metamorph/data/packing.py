"""Which documents go into which row of a pack: chosen so that rows are full and no document is split or left behind.

Rows are filled one after another from a window of documents that wait, in the order in which they were drawn. Each row takes the document
that has waited longest, and of the others those that fill it best; among equals those that have waited longer. So nothing waits for ever,
rows are nearly full as soon as the window holds a few rows' worth, and the order of documents is still that of the draws, slightly stirred.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from metamorph.errors import ConfigError, ContextLengthError

Item = TypeVar("Item", bound=Sized)

LOOK_AHEAD = 4
"""Rows' worth of documents that wait: rows of 512 to 4,096 positions are then more than 99% full of short chats and long records of
images (benchmarks/packing.py); with 2 about 98.5%."""


def fill_row(lengths: Sequence[int], max_length: int) -> list[int]:
    """Which documents make one row: the first, and with it those that leave least room; early ones where there is a choice.

    Exact, by the sums that can be reached (bit s of a number: sum s can be reached). Takes time of number of documents x max_length / 64.

    Args:
        lengths: of the documents that wait, oldest first; none longer than `max_length`.
        max_length: positions in the row.
    """
    within = (1 << (max_length + 1)) - 1
    reachable = [1 << lengths[0]]
    for length in lengths[1:]:
        if reachable[-1] >> max_length:  # the row is full already with what waited longer
            break
        reachable.append((reachable[-1] | (reachable[-1] << length)) & within)
    total, chosen = reachable[-1].bit_length() - 1, [0]
    for index in range(len(reachable) - 1, 0, -1):
        if not reachable[index - 1] >> total & 1:
            chosen.append(index)
            total -= lengths[index]
    return sorted(chosen)


@dataclass(frozen=True)
class Packing:
    """How rows are packed.

    Args:
        max_length: positions in a row.
        look_ahead: read on until so many rows' worth of positions wait, before a row is filled.

    Raises:
        ConfigError: they leave no room.
    """

    max_length: int
    look_ahead: int = LOOK_AHEAD

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("max_length", "look_ahead"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} but at least 1 is needed (packing). Raise it.")


@dataclass
class RowPacker(Generic[Item]):
    """Fills rows from a sequence of documents, whose lengths are known only when they come.

    Args:
        documents: in the order in which they were drawn.
        packing: how.

    Attributes:
        waiting: what has come and is in no row yet.
    """

    documents: Iterator[Item]
    packing: Packing
    waiting: list[Item] = field(default_factory=list)

    def next_row(self) -> list[Item]:
        """The documents of the next row; none when all are placed.

        Raises:
            ContextLengthError: a document is longer than a row.
        """
        max_length = self.packing.max_length
        room = self.packing.look_ahead * max_length - sum(map(len, self.waiting))
        while room > 0 and (document := next(self.documents, None)) is not None:
            if len(document) > max_length:
                place = getattr(document, "id", "") or "a document without id"
                found = f"{len(document)} positions but at most {max_length} fit"
                raise ContextLengthError(f"{found} ({place}). Raise max_length or leave the record out.")
            self.waiting.append(document)
            room -= len(document)
        if not self.waiting:
            return []
        chosen = fill_row([len(document) for document in self.waiting], max_length)
        row = [self.waiting[index] for index in chosen]
        self.waiting = [document for index, document in enumerate(self.waiting) if index not in chosen]
        return row
