"""One row, checked as training would read it and further: its images are opened and its positions counted.

What other rows must not repeat is remembered as hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from metamorph.data.datasets.published import PublishedSource, field_of
from metamorph.data.faults import Fault, from_error
from metamorph.data.lengths import EstimatedLengths, Lengths, Measure
from metamorph.data.media_faults import fault_of_image
from metamorph.data.mixture import ExampleSource
from metamorph.data.records import to_example
from metamorph.data.references import Roots
from metamorph.data.rows import RawRow
from metamorph.data.source import FileSource
from metamorph.data.turns import MediaRef, Teller
from metamorph.errors import MediaError, MetaMorphError
from metamorph.media import DEFAULT_LIMITS, ImageLimits, detected_format, format_of_name, image_hash
from metamorph.messages import Example, ImagePart, ImageSource, TextPart, VideoPart

_REMEMBERED = 2**16  # images whose verdict is kept: neighbouring rows often name the same one
OWN_NAMES = frozenset({"id", "__key__", "__url__", "__index_in_shard__"})
"""Fields that name a row and say nothing: rows that differ by nothing else are the same."""
_MEDIA_FIELDS = ("image", "images", "video", "videos")


@dataclass(frozen=True)
class CheckSettings:
    """What is asked of rows beside being readable.

    Attributes:
        measure: counts positions.
        max_length: longest row that training takes; None = rows may be of any length.
        limits: of images.
    """

    measure: Measure = field(default_factory=EstimatedLengths)
    max_length: int | None = None
    limits: ImageLimits = DEFAULT_LIMITS


@dataclass(frozen=True)
class SeenImage:
    """An image that a row names: in which field, under which name ("" = it has none), and a hash of its file."""

    field: str
    name: str
    content: int


@dataclass(frozen=True)
class RowFindings:
    """What was found out about one row. `example` is None where a fault leaves none."""

    place: str
    faults: tuple[Fault, ...]
    example: Example | None = None
    lengths: Lengths | None = None
    images: tuple[SeenImage, ...] = ()
    content: int = 0  # hash of all fields but its own names; 0 where the row could not be read
    columns: tuple[str, ...] = ()  # names of its fields
    shapes: tuple[tuple[str, str], ...] = ()  # field of media -> "text", "a list" or "an object"
    id: str = ""  # the row's own; "" where it has none, so that its place stands in

    @property
    def letters(self) -> int:
        """Characters of text."""
        parts = [part for message in self.example.messages for part in message.parts] if self.example else []
        return sum(len(part.text) for part in parts if isinstance(part, TextPart))


class RowChecker:
    """Checks rows of one source, one after the other, in one process."""

    def __init__(self, source: ExampleSource, settings: CheckSettings) -> None:
        self._source, self._settings = source, settings
        self._records = replace(source.settings, see_medium=self._see) if isinstance(source, FileSource) else None
        self._verdict = lru_cache(maxsize=_REMEMBERED)(self._look)
        self._seen: list[SeenImage] = []  # of the row that is being read

    def check(self, index: int) -> RowFindings:
        """Row `index`."""
        self._seen = []
        faults: list[Fault] = []
        if isinstance(self._source, PublishedSource):
            return self._check_published(self._source, index, faults)
        if self._records is None:
            return self._check_example(index, faults)
        assert isinstance(self._source, FileSource)
        raw = self._source.rows.row_or_fault(index)
        if isinstance(raw, Fault):
            return RowFindings(raw.place, (raw,))
        example = to_example(raw, self._records, faults.append)
        lengths = None if example is None else self._measured(example, _turns_field(raw.values), faults)
        return RowFindings(
            raw.place,
            tuple(faults),
            example,
            lengths,
            tuple(self._seen),
            _content(raw.values),
            tuple(map(str, raw.values)),
            tuple(_shapes(raw, self._records.columns)),
            _own_id(example, raw.place),
        )

    def _check_example(self, index: int, faults: list[Fault]) -> RowFindings:
        """A row of a source that is no file of ours: only its example is known."""
        place = f"{self._source.name} row {index}"
        try:
            example = self._source[index]
        except MetaMorphError as error:
            return RowFindings(place, (from_error(error, "row-refused", place),))
        return self._looked_at(example, faults)

    def _check_published(self, source: PublishedSource, index: int, faults: list[Fault]) -> RowFindings:
        """A row of a published data set, whose reader says what is wrong with it."""
        raw = source.row_or_fault(index)
        if isinstance(raw, Fault):
            return RowFindings(raw.place, (raw,))
        example = source.examine(raw, index, faults.append)
        return RowFindings(raw.place, tuple(faults)) if example is None else self._looked_at(example, faults, raw)

    def _looked_at(self, example: Example, faults: list[Fault], raw: RawRow | None = None) -> RowFindings:
        """Open the images of an example, and count its positions."""
        teller = Teller(faults.append, example.place)
        for number, image in enumerate(image for message in example.messages for image in message.images):
            if image.image is not None:
                where = "" if raw is None else field_of(raw, image.image)
                self._see_image(image.image, "", where or f"image {number + 1}", teller, None)
        lengths = None if teller.failed else self._measured(example, "", faults)
        return RowFindings(example.place, tuple(faults), example, lengths, tuple(self._seen), id=_own_id(example, example.place))

    def _see(self, ref: MediaRef, part: ImagePart | VideoPart, teller: Teller) -> None:
        """Open an image that a record names."""
        if isinstance(part, VideoPart):
            self._seen += [SeenImage(ref.field, "", 0)] * len(part.frames)
            return
        if part.image is None:
            self._seen.append(SeenImage(ref.field, "", 0))
            return
        name = ref.value if isinstance(ref.value, str) else ref.value.get("path") if isinstance(ref.value, Mapping) else None
        roots: Roots = self._records.roots if self._records else Roots(None)
        written = name if isinstance(name, str) and not name.startswith("data:") else ""
        self._see_image(part.image, written, ref.field, teller, roots.folder)

    def _see_image(self, image: ImageSource, name: str, where: str, teller: Teller, root: Path | None) -> None:
        if isinstance(image, Path):
            name = os.path.normpath(name or image)
            fault, content = self._verdict(name, root)
        else:
            fault, content = self._judge(image, name, None)
        if fault is not None:
            teller.tell(replace(fault, place=teller.place, field=where))
        if self._records is not None and self._records.format != "pairs" and _named_after_sample(name, teller.place):
            name = ""  # samples that ask about one image each carry it, under their own name; only pairs should not repeat one
        self._seen.append(SeenImage(where, name, content))

    def _look(self, name: str, root: Path | None) -> tuple[Fault | None, int]:
        return self._judge(Path(name), name, root)

    def _judge(self, image: ImageSource, name: str, root: Path | None) -> tuple[Fault | None, int]:
        """What is wrong with an image, and the hash of its file (0 where it cannot be read)."""
        limits = self._settings.limits
        fault = fault_of_image(image, place="", root=root, limits=limits)
        if fault is None and isinstance(image, bytes) and name:
            fault = _fault_of_name(image, name)
        try:
            return fault, int.from_bytes(image_hash(image, root=root, limits=limits)[:8], "little", signed=True)
        except MediaError:
            return fault, 0

    def _measured(self, example: Example, where: str, faults: list[Fault]) -> Lengths | None:
        try:
            lengths = self._settings.measure(example)
        except MetaMorphError as error:
            faults.append(from_error(error, "not-encodable", example.place, where))
            return None
        limit = self._settings.max_length
        if limit is not None and lengths.positions > limit:
            fields = [image.field for image in self._seen]
            faults.append(_too_long(lengths, limit, example.place, where, fields, exact=self._settings.measure.exact))
        return lengths


def _own_id(example: Example | None, place: str) -> str:
    return example.id if example is not None and example.id != place else ""


def _named_after_sample(name: str, place: str) -> bool:
    """Whether an image lies in a tar and is called as its sample is."""
    _, sample, key = place.rpartition(" sample ")
    return bool(sample) and name.startswith(f"{key}.")


def _fault_of_name(data: bytes, name: str) -> Fault | None:
    """Whether bytes are what the name that goes with them says."""
    found, promised = detected_format(data), format_of_name(name)
    if promised is None or found == promised:
        return None
    said = f"{found} data under the name {name!r}"
    return Fault(
        "image-type", "", "", said, f"its name promises {promised}", "Rename it; it is read by its content.", "warning", media=True
    )


def _too_long(lengths: Lengths, limit: int, place: str, where: str, fields: list[str], *, exact: bool) -> Fault:
    """A row over the limit; named apart where a cut would go through an image that is to be learned."""
    cut = lengths.images_cut_at(limit)
    target = next((number for number in cut if lengths.is_target[number]), None)
    about = "" if exact else "about "
    lost = [f"{lengths.text_targets_from(limit)} text targets", *([f"{len(cut)} of {len(lengths.images)} images"] if cut else [])]
    found = f"{about}{lengths.positions} positions, the last {lengths.positions - limit} with {' and '.join(lost)}"
    remedy = "Raise max_length, shorten the text or show fewer images: training refuses the row, or drops its last turns (too_long)."
    severity = "error" if exact else "warning"
    if target is None:
        return Fault("row-too-long", place, where, found, f"at most {limit} are allowed", remedy, severity)
    start, end = lengths.images[target]
    where = fields[target] if len(fields) == len(lengths.images) else where
    found += f", among them a target image at positions {start} to {end - 1}"
    return Fault("target-image-cut", place, where, found, f"at most {limit} are allowed, and a target is learned whole", remedy, severity)


def _turns_field(values: Mapping[str, Any]) -> str:
    return next((name for name in ("conversations", "messages", "question", "caption", "text", "txt") if name in values), "")


def _content(values: Mapping[str, Any]) -> int:
    """A hash of what a row says: equal for rows that differ only in their ids; never 0."""
    told = {str(name): value for name, value in values.items() if name not in OWN_NAMES}
    text = json.dumps(told, sort_keys=True, ensure_ascii=False, default=_as_text)
    return digest(text.encode(errors="surrogatepass"))


def _as_text(value: Any) -> str:
    return hashlib.blake2b(value, digest_size=16).hexdigest() if isinstance(value, bytes) else str(value)


def digest(data: bytes) -> int:
    """64 bits that tell contents apart; never 0."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True) or 1


def _shapes(raw: RawRow, columns: Mapping[str, str]) -> list[tuple[str, str]]:
    """Of each field of media, how it is written."""
    names = [columns.get(name, name) for name in _MEDIA_FIELDS]
    given = [(name, raw.values[name]) for name in names if raw.values.get(name)]  # an empty list is a fault of its own
    kinds = ((str, "text"), (list | tuple, "a list"), (Mapping, "an object"))
    return [(name, kind) for name, value in given for cls, kind in kinds if isinstance(value, cls)]
