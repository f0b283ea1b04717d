"""The rounds in which processes encode the images of a data set: read rows, hash images, agree on who encodes which, encode.

What a round holds in memory is bounded. Images in files are opened when they are encoded; those that came with their row (of Parquet and
tars, or frames of a video) are kept up to a number of bytes, and beyond it their row is read a second time.

Axes: n images of a batch, k visual tokens per image, v vision width.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from metamorph.data.broken_images import BrokenImages
from metamorph.data.examining import examine
from metamorph.data.faults import Fault, from_error
from metamorph.data.mixture import ExampleSource
from metamorph.data.token_store import KeySet, ShardWriter
from metamorph.errors import DataError
from metamorph.media import image_hash
from metamorph.messages import Example, ImagePart, ImageSource
from metamorph.training.device import rank
from metamorph.training.stepping import gather_objects

FAULTS = "faults.txt"
FAULTS_KEPT = 1000  # in memory: a data set may be broken by the million
HELD_BYTES = 2**30
"""Of images that came with their rows, for each process and round."""


@dataclass
class EncodingProgress:
    """How far all processes together have come."""

    rows: int
    """Rows to read in all."""
    done: int = 0
    images: int = 0
    """Images that rows name."""
    unique: int = 0
    """Different ones among them."""
    encoded: int = 0
    """Those of them that were not in the store before."""
    broken: int = 0
    """Rows, and images of rows, that could not be read."""
    faults: list[str] = field(default_factory=list)
    """The first of them, each in a line that begins with its place; all are in the store's faults.txt."""
    bytes: int = 0
    """Size of the store, once it is finished."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Numbered:
    """All rows of all sources under one numbering."""

    sources: Sequence[ExampleSource]

    def find(self, number: int) -> tuple[ExampleSource, int]:
        """The source of a row, and the row's number there."""
        ends = list(accumulate(len(source) for source in self.sources))
        source = bisect_right(ends, number)
        return self.sources[source], number - (ends[source - 1] if source else 0)


class Budget:
    """Bytes that threads may hold between them."""

    def __init__(self, limit: int) -> None:
        self._limit, self._left, self._lock = limit, limit, Lock()

    def take(self, size: int) -> bool:
        """Whether so many more may be held; then they count."""
        with self._lock:
            if size > self._left:
                return False
            self._left -= size
            return True

    def give_back(self) -> None:
        """Nothing is held any more."""
        self._left = self._limit


class FoundImage(NamedTuple):
    """An image that a row shows."""

    key: bytes
    image: ImageSource | None
    """None = the row is to be read again; never of a path, which takes no memory."""
    row: int
    number: int
    """In its row, from 1."""


@dataclass(frozen=True)
class SeenRow:
    """One row's images, or what is wrong."""

    place: str = ""
    images: tuple[FoundImage, ...] = ()
    faults: tuple[str, ...] = ()


Prepared = list[tuple[bytes, "np.ndarray | Fault"]]


@dataclass
class Rounds:
    """What the rounds share."""

    rows: Numbered
    encode: Callable[[Float[Tensor, "n 3 h w"]], Float[Tensor, "n k v"]]
    prepare: Callable[[ImagePart], Float[np.ndarray, "3 h w"]]
    writer: ShardWriter
    pool: ThreadPoolExecutor
    batch_size: int
    known: KeySet
    """Hashes of images in the store."""
    broken: BrokenImages
    progress: EncodingProgress
    budget: Budget
    seen: KeySet = field(default_factory=KeySet)
    """Hashes of images of these rows, as far as they were read."""

    def round(self, numbers: Iterable[int]) -> None:
        """Read some rows, this process's share; all processes call it."""
        self.budget.give_back()
        rows = list(self.pool.map(self.look, numbers))
        mine: dict[bytes, FoundImage] = {}
        for row in rows:
            for image in row.images:
                mine.setdefault(image.key, image)
        shares = gather_objects(list(mine))
        owners = {key: owner for owner in range(len(shares) - 1, -1, -1) for key in shares[owner]}  # whoever saw it first
        new = [image for key, image in mine.items() if owners[key] == rank() and key not in self.known]
        failed = self.encode_new(new)
        counts = (len(rows), sum(len(row.images) for row in rows), len(new) - len(failed))
        told = gather_objects((failed, [fault for row in rows for fault in row.faults], counts))
        broken = {key: error for failures, _, _ in told for key, error in failures.items()}
        named = [str(_named(broken[one.key], row.place, one.image, one.number)) for row in rows for one in row.images if one.key in broken]
        for key in owners:
            if key not in broken:
                self.known.add(key)
                self.seen.add(key)
        self._count(*(sum(column) for column in zip(*(counts for _, _, counts in told), strict=True)))
        faults = [fault for _, own, _ in told for fault in own]
        faults += [fault for own in (gather_objects(named) if broken else []) for fault in own]
        self._note(faults, broken)

    def look(self, number: int) -> SeenRow:
        """Read a row and hash its images."""
        example = _read(*self.rows.find(number))
        if isinstance(example, str):
            return SeenRow(faults=(example,))
        images, faults = [], []
        for position, image in _images(example):
            try:
                key = image_hash(image)
            except DataError as error:
                faults.append(str(_named(_fault(error), example.place, image, position)))
                continue
            images.append(FoundImage(key, image if self.budget.take(_held(image)) else None, number, position))
        return SeenRow(example.place, tuple(images), tuple(faults))

    def encode_new(self, new: Sequence[FoundImage]) -> dict[bytes, Fault]:
        """Encode and keep images; returns those that do not decode, and why."""
        failed: dict[bytes, Fault] = {}
        keys: list[bytes] = []
        pixels: list[Tensor] = []
        for key, result in self.prepared(new):
            if isinstance(result, Fault):
                failed[key] = result
                continue
            keys.append(key)
            pixels.append(torch.from_numpy(result))
            if len(keys) == self.batch_size:
                self.writer.add(keys, self.encode(torch.stack(pixels)))
                keys, pixels = [], []
        if keys:
            self.writer.add(keys, self.encode(torch.stack(pixels)))
        return failed

    def prepared(self, new: Sequence[FoundImage]) -> Iterator[tuple[bytes, np.ndarray | Fault]]:
        """Pixels in order, made by threads that are a few batches ahead."""
        waiting: deque[tuple[int, Future[Prepared]]] = deque()
        ahead = 0
        for images in _tasks(new):
            waiting.append((len(images), self.pool.submit(self.pixels, images)))
            ahead += len(images)
            while ahead > 2 * self.batch_size:
                number, result = waiting.popleft()
                ahead -= number
                yield from result.result()
        for _, result in waiting:
            yield from result.result()

    def pixels(self, images: Sequence[FoundImage]) -> Prepared:
        """Of one image, or of images of one row that is read again for them."""
        first = images[0]
        if first.image is not None:
            return [(first.key, self._pixels(first.image))]
        example = _read(*self.rows.find(first.row))
        if isinstance(example, str):
            raise DataError(f"{example} But it could be read before. Do not change data that are being encoded.")
        again = dict(_images(example))
        return [(one.key, self._pixels(again[one.number])) for one in images]

    def _pixels(self, image: ImageSource) -> np.ndarray | Fault:
        try:
            return self.prepare(ImagePart(image))
        except DataError as error:
            return _fault(error)

    def _count(self, rows: int, images: int, encoded: int) -> None:
        progress = self.progress
        progress.done, progress.images, progress.encoded = progress.done + rows, progress.images + images, progress.encoded + encoded
        progress.unique = len(self.seen)

    def _note(self, faults: list[str], broken: dict[bytes, Fault]) -> None:
        """Count faults, keep the first, and write all of them down on the first process."""
        self.progress.broken += len(faults)
        self.progress.faults += faults[: FAULTS_KEPT - len(self.progress.faults)]
        if faults and rank() == 0:
            self.broken.add(broken)
            with (self.writer.directory / FAULTS).open("a", encoding="utf-8", errors="backslashreplace") as listing:
                listing.writelines(f"{' '.join(fault.splitlines())}\n" for fault in faults)


def _tasks(images: Sequence[FoundImage]) -> Iterator[list[FoundImage]]:
    """Images one by one, but together those of a row that is read again."""
    for again, group in groupby(images, key=lambda image: None if image.image is not None else image.row):
        if again is not None:
            yield list(group)
        else:
            yield from ([image] for image in group)


def _images(example: Example) -> Iterator[tuple[int, ImageSource]]:
    """Its images that are not visual tokens already, with their numbers from 1; frames of videos included."""
    parts = (part for message in example.messages for part in message.images)
    yield from ((number, part.image) for number, part in enumerate(parts, start=1) if part.image is not None)


def _held(image: ImageSource) -> int:
    """Bytes of memory that keeping an image takes."""
    if isinstance(image, Image.Image):
        return image.width * image.height * len(image.getbands())
    return len(image) if isinstance(image, bytes) else 0


def _read(source: ExampleSource, index: int) -> Example | str:
    """A row, or the first thing that is wrong with it, as `metamorph data check` says it."""
    faults: list[Fault] = []
    try:
        example = examine(source, index, faults.append)
    except DataError as error:
        return f"{source.name} row {index}: {error}"
    wrong = [fault for fault in faults if fault.severity == "error"]
    if wrong:
        return str(wrong[0])
    assert example is not None, "a fault that leaves no example is an error"
    return example


def _fault(error: DataError) -> Fault:
    """What is wrong with an image, whatever row and name it has."""
    return from_error(error, "image-broken", place="")


def _named(fault: Fault, place: str, image: ImageSource | None, number: int) -> Fault:
    """A fault of an image in its row."""
    found = f"{fault.found} in {str(image)!r}" if isinstance(image, Path) else fault.found
    return replace(fault, place=place, field=f"image {number}", found=found)
