"""Pairs of images and captions in WebDataset tars, as img2dataset writes them: CC12M, LAION, COYO, or any. See docs/datasets/pairs.md."""

from __future__ import annotations

import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from metamorph.data.datasets.published import PublishedSource, RandomRows, folder, identity, image_of, open_records, typed
from metamorph.data.kinds import Generation, generation
from metamorph.data.rows import RawRow
from metamorph.data.webdataset import Member
from metamorph.errors import ConfigError, RecordError
from metamorph.messages import Example

CAPTIONS = ("caption", "text")
"""Fields of a pair that hold its caption (a `.txt` is the first of them); the first that is there."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairFilter:
    """Which pairs are kept; a rule of None keeps all.

    Raises:
        ConfigError: a rule is below 1.
    """

    min_caption_length: int | None = None
    max_caption_length: int | None = None
    min_side: int | None = None
    max_aspect_ratio: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.rules.items():
            if value < 1:
                raise ConfigError(f"{name} {value} but at least 1 is needed (pairs). Raise it, or leave it out.")

    @property
    def rules(self) -> dict[str, float]:
        """The rules that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def broken_by(self, raw: RawRow) -> str | None:
        """The first rule that a pair breaks. One without caption breaks none: it is an error of its own where it is read.

        Raises:
            RecordError: a rule asks for sizes, which the pair does not state.
        """
        length = len(caption.strip()) if isinstance(caption := _caption(raw.values), str) else None
        if length is not None and self.min_caption_length is not None and length < self.min_caption_length:
            return "min_caption_length"
        if length is not None and self.max_caption_length is not None and length > self.max_caption_length:
            return "max_caption_length"
        if self.min_side is None and self.max_aspect_ratio is None:
            return None
        shorter, longer = sorted(_side(raw, name) for name in ("width", "height"))
        if self.min_side is not None and shorter < self.min_side:
            return "min_side"
        return "max_aspect_ratio" if self.max_aspect_ratio is not None and longer / shorter > self.max_aspect_ratio else None


@dataclass(frozen=True)
class ChosenRows:
    """Some of the rows of a container, by their numbers."""

    rows: RandomRows
    chosen: Int64[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int, /) -> RawRow:
        """Row `index` of those that were chosen."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} but 0 to {len(self) - 1} exist")
        return self.rows[int(self.chosen[index])]


def source(
    directory: str,
    name: str = "pairs",
    min_caption_length: int | None = None,
    max_caption_length: int | None = None,
    min_side: int | None = None,
    max_aspect_ratio: float | None = None,
    seed: int = 0,
) -> PublishedSource:
    """Requests for images with a caption in them, answered by the image.

    Args:
        directory: a folder with tars, at any depth; or one tar.
        name: how tables and errors call the source.
        min_caption_length: leave out shorter captions (characters, without white space around them).
        max_caption_length: leave out longer ones.
        min_side: leave out images whose shorter side has fewer pixels, by the `width` and `height` of a pair's .json.
        max_aspect_ratio: leave out images whose longer side is more than so many times the shorter.
        seed: of the wording.

    Raises:
        RecordError: there are no tars, or no pairs (that the filters keep).
        ConfigError: a filter is out of range.
    """
    kept = PairFilter(min_caption_length, max_caption_length, min_side, max_aspect_ratio)
    path = Path(directory)
    files = [path] if path.is_file() else sorted(folder(directory, holds="tars of pairs").rglob("*.tar"))
    if not files:
        raise RecordError(f"0 files .tar but at least 1 is needed ({path}). Fetch the images with img2dataset, in format webdataset.")
    rows: RandomRows = open_records(files, None, name)
    return PublishedSource(_filtered(rows, files, kept, name) if kept.rules else rows, partial(convert, name=name), name, seed)


def convert(raw: RawRow, rng: np.random.Generator, name: str) -> Example:
    """A pair as an example.

    Raises:
        RecordError, MediaError: it lacks its image or its caption, or the caption is blank.
    """
    caption = typed(raw, _caption(raw.values), str, CAPTIONS[0], "text, in .txt or in .json,")
    image = image_of(raw, raw.values.get("image"), None, "image")
    return generation(Generation(image=image, caption=caption, **identity(raw, name, "key")), rng)


def _caption(values: Mapping[str, Any]) -> Any:
    return next((values[field] for field in CAPTIONS if values.get(field) is not None), None)


def _side(raw: RawRow, name: str) -> float:
    value = raw.values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        found = "null or no field" if value is None else f"{value!r:.40}"
        raise RecordError(f"{found} but a number above 0 is needed to filter by size ({raw.place}, {name}). Leave that filter out.")
    return float(value)


def _filtered(rows: RandomRows, files: Sequence[Path], kept: PairFilter, name: str) -> ChosenRows:
    """The pairs that a filter keeps; reads the texts of all of them once, and no image."""
    broken = [kept.broken_by(raw) for file in files for raw in _texts(file)]
    if len(broken) != len(rows):
        found = f"{len(broken)} pairs found and {len(rows)} in the indexes"
        raise RecordError(f"{found} but the two must agree (source {name}). Delete the .index files beside the tars.")
    chosen = np.flatnonzero(np.array([rule is None for rule in broken]))
    left_out = Counter(rule for rule in broken if rule is not None)
    if left_out:
        counts = ", ".join(f"{rule} {number}" for rule, number in sorted(left_out.items()))
        _log.info("%d of %d pairs are left out (source %s): %s", len(rows) - len(chosen), len(rows), name, counts)
    if not len(chosen):
        raise RecordError(f"0 pairs of {len(rows)} left but at least 1 is needed (source {name}; filters {kept.rules}). Loosen them.")
    return ChosenRows(rows, chosen)


def _texts(file: Path) -> Iterator[RawRow]:
    """The pairs of a tar without their images, in the order in which they begin. What cannot be parsed is said when it is read."""
    samples: dict[str, dict[str, Any]] = {}
    with tarfile.open(file, mode="r:") as archive:
        for entry in archive:
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it would keep them all
            member = Member(entry.name, 0, 0)
            if not entry.isreg() or Path(entry.name).name.startswith("."):
                continue
            sample = samples.setdefault(member.key, {})
            if member.ending in ("txt", "json") and (opened := archive.extractfile(entry)) is not None:
                text = opened.read().decode("utf-8", "replace")
                sample |= {"caption": text} if member.ending == "txt" else {**_parsed(text), **sample}
    yield from (RawRow(values, f"{file} sample {key}") for key, values in samples.items())


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, Mapping) else {}
