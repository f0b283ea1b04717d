"""Conversations in JSON-lines files: opened in the time it takes to find the line ends, parsed and checked when asked for.

One record per line, as drawn at the top of `metamorph.messages`; blank lines are passed over. `source` defaults to the reader's name and
`id` to `file:line`. A broken line is an error that names file and line; by choice, a stated number of them is set aside and reported.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from metamorph.errors import DataError, RecordError
from metamorph.media import DEFAULT_LIMITS, ImageLimits, open_image
from metamorph.messages import Example, from_json, to_json, validate_messages

_CHUNK = 2**24
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quarantine:
    """Leave to set at most `limit` broken lines aside. They are listed in `path` (default: beside the file, `.quarantine.jsonl`).

    The first opening reads and checks the whole file; later ones take the list, as long as file and question are the same.
    With `check_images` every image is decoded too.
    """

    limit: int
    path: Path | None = None
    check_images: bool = False


class JsonlSource:
    """The records of a file as examples: an `ExampleSource` that many threads and processes may share.

    Args:
        path: the file.
        root: the folder to which image paths are relative and which they may not leave; default: the file's own.
        name: how tables and errors call the source; default: the file's name without ending.
        needs_answer: refuse conversations in which the assistant says nothing, from which nothing can be learned.
        quarantine: leave to set broken lines aside; None refuses the first one that is asked for.
        max_line_bytes: a longer line is refused unread.
        limits: of images, when they are checked.

    Raises:
        RecordError: no such file, no records, or (with a quarantine) more broken lines than allowed.
    """

    def __init__(
        self,
        path: Path,
        *,
        root: Path | None = None,
        name: str = "",
        needs_answer: bool = True,
        quarantine: Quarantine | None = None,
        max_line_bytes: int = 2**26,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        self.path, self.root, self.name = path, path.parent if root is None else root, name or path.stem
        self._needs_answer, self._max_line_bytes, self._limits = needs_answer, max_line_bytes, limits
        try:
            self._starts, self._rows = _find_lines(path)
        except OSError as error:
            raise RecordError(f"a file that cannot be read ({error.strerror}) but records are needed ({path}). Check the path.") from error
        if quarantine is not None:
            aside = _set_aside(self, quarantine)
            self._rows = self._rows[~np.isin(self._rows, np.array(sorted(aside), dtype=np.int64) - 1)]
        if not len(self._rows):
            raise RecordError(f"0 records but at least 1 is needed ({path}). Write one JSON object per line.")

    def __len__(self) -> int:
        """Number of records."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        """Record `index` (from 0), parsed and checked.

        Raises:
            RecordError, MediaError: the line is broken; the message names file and line.
            IndexError: there is no such record.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} but 0 to {len(self) - 1} exist ({self.path})")
        return self._parse(int(self._rows[index]))

    def place(self, index: int) -> str:
        """File and line of a record."""
        return f"{self.path}:{int(self._rows[index]) + 1}"

    def _parse(self, row: int) -> Example:
        place = f"{self.path}:{row + 1}"
        start, end = int(self._starts[row]), int(self._starts[row + 1])
        if end - start > self._max_line_bytes:
            raise RecordError(
                f"{end - start} bytes but a line of at most {self._max_line_bytes} is allowed ({place}). Keep images in files."
            )
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        try:
            record = json.loads(data.decode("utf-8-sig" if row == 0 else "utf-8"), object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"a line that is no JSON ({error}) but one object is needed ({place}). Repair or delete the line.") from error
        example = from_json(record, root=self.root, place=place)
        if self._needs_answer:
            validate_messages(example.messages, place, needs_answer=True)
        return example if example.source else replace(example, source=self.name)

    def _check(self, row: int, check_images: bool) -> str | None:
        """What is wrong with a line, if anything."""
        try:
            example = self._parse(row)
            for image in (image for message in example.messages for image in message.images if check_images):
                if image.image is not None:
                    open_image(image.image, limits=self._limits)
        except DataError as error:
            return str(error)
        return None


def write_jsonl(path: Path, examples: list[Example], *, root: Path | None = None) -> None:
    """Write records that `JsonlSource(path, root=root)` reads back; the file appears at once, whole.

    Raises:
        MediaError: an image path lies outside the root (default: the file's folder).
    """
    lines = [json.dumps(to_json(example, root=path.parent if root is None else root), ensure_ascii=False) for example in examples]
    _write_whole(path, lines)


def _find_lines(path: Path) -> tuple[Int64[np.ndarray, " lines_and_end"], Int64[np.ndarray, " records"]]:
    """The offset of each line and of the end of the file; and which lines (numbered from 0) are not blank."""
    ends, offset = [np.zeros(1, dtype=np.int64)], 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            ends.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 10) + (offset + 1))
            offset += len(chunk)
    starts = np.concatenate(ends)
    has_tail = bool(starts[-1] != offset)  # the last line need not end in a newline
    if has_tail:
        starts = np.append(starts, offset)
    filled = np.diff(starts) > 1
    if has_tail:
        filled[-1] = True
    return starts, np.flatnonzero(filled)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object whose keys differ; JSON would let the last of two equal keys win silently."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} twice in one object")
    return result


def _set_aside(source: JsonlSource, quarantine: Quarantine) -> dict[int, str]:
    """The broken lines (numbered from 1) and what is wrong with each, from the list or from a reading of the file."""
    listing = quarantine.path or source.path.with_name(source.path.name + ".quarantine.jsonl")
    status = source.path.stat()
    question = {"file": source.path.name, "bytes": status.st_size, "modified_ns": status.st_mtime_ns, "images": quarantine.check_images}
    aside = _listed(listing, question)
    if aside is None:
        aside = _find_broken(source, quarantine)
        entries = [json.dumps({"line": line, "error": error}) for line, error in aside.items()]
        _write_whole(listing, [json.dumps(question), *entries])
    elif len(aside) > quarantine.limit:
        raise _too_many(source.path, aside, quarantine.limit)
    if aside:
        _log.warning("%d of %d lines of %s set aside; see %s", len(aside), len(source._rows), source.path, listing)
    return aside


def _find_broken(source: JsonlSource, quarantine: Quarantine) -> dict[int, str]:
    """Read and check every line; stop as soon as there are too many broken ones."""
    aside: dict[int, str] = {}
    for row in source._rows.tolist():
        if error := source._check(row, quarantine.check_images):
            aside[row + 1] = error
        if len(aside) > quarantine.limit:
            raise _too_many(source.path, aside, quarantine.limit)
    return aside


def _too_many(path: Path, aside: dict[int, str], limit: int) -> RecordError:
    first = "; ".join(list(aside.values())[:3])
    return RecordError(f"at least {len(aside)} broken lines but at most {limit} may be set aside ({path}). Repair them, first: {first}")


def _listed(listing: Path, question: dict[str, object]) -> dict[int, str] | None:
    """The list of an earlier reading, if it answers the same question."""
    if not listing.is_file():
        return None
    try:
        first, *rest = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
        return {entry["line"]: entry["error"] for entry in rest} if first == question else None
    except (ValueError, KeyError, TypeError):  # not a list that we wrote: read the file again
        return None


def _write_whole(path: Path, lines: list[str]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(partial, path)
