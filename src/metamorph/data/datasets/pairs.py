"""Pairs of images and captions in WebDataset tars, as img2dataset writes them: CC12M, LAION, COYO, or any. See docs/datasets/pairs.md."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from metamorph.data.containers import ConcatenatedRows
from metamorph.data.datasets.published import PublishedSource, folder, identity, image_of, open_records, typed
from metamorph.data.faults import Fault
from metamorph.data.file_index import IndexWriter, Notes, open_index, shown
from metamorph.data.kinds import Generation, generation
from metamorph.data.rows import OF_ONE_ROW, FaultyRows, RawRow, Rows
from metamorph.data.webdataset import Member, TarSamples
from metamorph.errors import ConfigError, RecordError
from metamorph.messages import Example

CAPTIONS = ("caption", "text")
"""Fields of a pair that hold its caption (a `.txt` is the first of them); the first that is there."""
_VERSION = 1  # of what rules mean: numbers that another one kept are found anew
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


class ChosenRows(FaultyRows):
    """The samples of a tar that a filter keeps. Their numbers lie beside the tar, as its index does: its texts are read once.

    Args:
        rows: the tar.
        kept: the filter; another has a file of its own.

    Raises:
        RecordError: a rule asks for sizes, which a pair does not state; or there is no place to write to.
    """

    root: Path | None = None  # all media are in the tar

    def __init__(self, rows: TarSamples, kept: PairFilter) -> None:
        self.rows, self.name = rows, rows.name
        kind = f"pairs {_VERSION} {json.dumps(kept.rules, sort_keys=True)}"
        ending = f"{hashlib.blake2b(kind.encode(), digest_size=4).hexdigest()}.index"
        self._index = open_index(rows.path, kind, partial(_scan, rows=rows, kept=kept), ending=ending)

    def __len__(self) -> int:
        """Number of samples that are kept."""
        return self._index.count("starts")

    @property
    def left_out(self) -> dict[str, int]:
        """Rule -> samples that break it, and none before it."""
        return self._index.notes["left_out"]

    def row_or_fault(self, index: int, /) -> RawRow | Fault:
        """Row `index` of those that are kept."""
        self.check_index(index, str(self.rows.path))
        return self.rows.row_or_fault(int(self._index.section("starts")[index]))

    def faults(self) -> Iterator[Fault]:
        """Those of the tar as a whole. Samples that are kept tell of theirs when they are read; of those left out nobody need hear."""
        return (fault for fault in self.rows.faults() if fault.code not in OF_ONE_ROW)


def source(
    directory: str,
    name: str = "pairs",
    min_caption_length: int | None = None,
    max_caption_length: int | None = None,
    min_side: int | None = None,
    max_aspect_ratio: float | None = None,
    seed: int = 0,
    whole_files: bool = True,
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
        whole_files: refuse a tar that is cut off or empty; off to look at what is left of it.

    Raises:
        RecordError: there are no tars, or no pairs (that the filters keep).
        ConfigError: a filter is out of range.
    """
    kept = PairFilter(min_caption_length, max_caption_length, min_side, max_aspect_ratio)
    path = Path(directory)
    files = [path] if path.is_file() else sorted(folder(directory, holds="tars of pairs").rglob("*.tar"))
    if not files:
        raise RecordError(f"0 files .tar but at least 1 is needed ({path}). Fetch the images with img2dataset, in format webdataset.")
    rows = open_records(files, None, name, whole_files=whole_files)
    return PublishedSource(_filtered(rows, kept, name) if kept.rules else rows, partial(convert, name=name), name, seed)


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


def _filtered(rows: Rows, kept: PairFilter, name: str) -> Rows:
    """The pairs that a filter keeps."""
    tars = [part for part in (rows.parts if isinstance(rows, ConcatenatedRows) else (rows,)) if isinstance(part, TarSamples)]
    sizes = [tar.path.stat().st_size for tar in tars]
    found: dict[int, ChosenRows] = {}
    with shown(f"the texts of {name}", sum(sizes), True) as advance:
        for number in np.random.default_rng(os.getpid()).permutation(len(tars)).tolist():  # processes that begin at once share the work
            found[number] = ChosenRows(tars[number], kept)
            advance(sizes[number])
    chosen = [found[number] for number in range(len(tars))]
    left_out = sum((Counter(part.left_out) for part in chosen), Counter())
    if left_out:
        counts = ", ".join(f"{rule} {number}" for rule, number in sorted(left_out.items()))
        _log.info("%d of %d pairs are left out (source %s): %s", left_out.total(), len(rows), name, counts)
    if not any(map(len, chosen)):
        raise RecordError(f"0 pairs of {len(rows)} left but at least 1 is needed (source {name}; filters {kept.rules}). Loosen them.")
    return chosen[0] if len(chosen) == 1 else ConcatenatedRows(chosen, name)


def _scan(file: BinaryIO, writer: IndexWriter, *, rows: TarSamples, kept: PairFilter) -> Notes:
    """The numbers of the samples that a filter keeps; reads their texts, and no image."""
    broken = [_rule_broken(file, rows, index, kept) for index in range(len(rows))]
    writer.stream(np.flatnonzero([rule is None for rule in broken]))
    return {"left_out": dict(Counter(rule for rule in broken if rule is not None))}


def _rule_broken(file: BinaryIO, rows: TarSamples, index: int, kept: PairFilter) -> str | None:
    """The rule that a sample breaks by its texts. One whose .json is missing or none is kept, and its fault told when it is read."""
    members = rows.members(index)
    texts = {member.ending: _text(file, member) for member in members if member.ending in ("txt", "json")}
    facts = _parsed(texts.get("json", ""))
    caption = {"caption": texts["txt"]} if "txt" in texts else {}
    try:
        return kept.broken_by(RawRow({**(facts or {}), **caption}, f"{rows.path} sample {members[0].key}"))
    except RecordError:
        if facts is not None:
            raise  # a whole pair that does not state its size: the filter cannot be used
        return None


def _text(file: BinaryIO, member: Member) -> str:
    file.seek(member.offset)
    return file.read(member.size).decode("utf-8", "replace")


def _parsed(text: str) -> Mapping[str, Any] | None:
    try:
        values = json.loads(text)
    except ValueError:
        return None
    return values if isinstance(values, Mapping) else None
