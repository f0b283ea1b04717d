"""Files as a source of examples: containers give rows, records give examples. What recipes name to read data of their own."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from metamorph.data.faults import Fault, Report, raise_errors
from metamorph.data.record_fields import FORMATS, Format, check_columns, detect, nearest_column
from metamorph.data.records import RecordSettings, to_example
from metamorph.data.references import Fetch, Roots
from metamorph.data.rows import Rows, refuse_broken_files
from metamorph.data.video import VideoSampling, raise_or_log, sample_frames
from metamorph.errors import ConfigError
from metamorph.messages import Example, ImagePart, VideoPart

if TYPE_CHECKING:
    from metamorph.data.decoding import VideoSource

PROBED_ROWS = 20
"""Rows at the front of a file by which its format is told."""
COMPARED_ROWS = 2000
"""Rows in which columns that are named are looked for."""
_log = logging.getLogger(__name__)


class FileSource:
    """Rows of any container as examples: an `ExampleSource` that many threads and processes may share.

    Args:
        rows: the container.
        settings: how rows are read; a format of None is told from the first rows, and then holds for all.
    """

    def __init__(self, rows: Rows, settings: RecordSettings) -> None:
        self.rows, self.name = rows, settings.source or rows.name
        self.settings = replace(settings, source=self.name, format=settings.format or format_of(rows, settings.columns))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Row `index` (from 0) as an example.

        Raises:
            RecordError, MediaError: it is broken; the message names file, line and field.
            IndexError: there is no such row.
        """
        example = to_example(self.rows[index], self.settings, raise_or_log)
        assert example is not None, "a fault that leaves no example is an error, and errors raise"
        return example

    def examine(self, index: int, report: Report = raise_errors) -> Example | None:
        """Row `index` as an example, its faults told to `report`; None where they leave none."""
        row = self.rows.row_or_fault(index)
        if isinstance(row, Fault):
            report(row)
            return None
        return to_example(row, self.settings, report)


def format_of(rows: Rows, columns: Mapping[str, str] | None = None) -> Format | None:
    """The format of most of the first rows; None where none of them tells."""
    names = {theirs: ours for ours, theirs in (columns or {}).items()}
    found = []
    for index in range(min(len(rows), PROBED_ROWS)):
        row = rows.row_or_fault(index)
        if not isinstance(row, Fault):
            found.append(detect({names.get(name, name): value for name, value in row.values.items()}))
    told = [kind for kind in found if kind is not None]
    if {"messages", "metamorph"} <= set(told):
        return "messages"  # the looser of the two reads both
    return max(dict.fromkeys(told), key=told.count, default=None)


def open_source(
    path: str | Path | Sequence[str | Path],
    image_root: str | Path | None = None,
    name: str = "",
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    needs_answer: bool = True,
    allow_urls: bool = False,
    fps: float = 1.0,
    max_frames: int = 45,
    min_frames: int = 1,
    damaged_videos: str = "refuse",
    seed: int = 0,
    whole_files: bool = True,
) -> FileSource:
    """Data files of any known kind, for recipes: JSON, JSON lines, Parquet, WebDataset tars, folders of images with captions.

    Args:
        path: a file, folder, glob, or a list of them; `hf://datasets/NAME` for the hub.
        image_root: the folder to which media paths are relative and which they may not leave; by default the file's own.
        name: how tables and errors call the source; by default the file's name.
        format: llava, messages, metamorph, qa or pairs; by default told from the rows.
        columns: our name of a field -> its name in the file.
        needs_answer: refuse rows in which the assistant says nothing.
        allow_urls: fetch images that are named by a URL.
        fps: frames per second that are taken of a video (paper, section 5: 1).
        max_frames: of a video, the first ones (paper: 45).
        min_frames: refuse videos that give fewer. A check warns of those that give only one.
        damaged_videos: `refuse` videos that break off, or `shorten` them to the frames before the break, with a warning in the log.
        seed: of the wording of requests where rows are pairs.
        whole_files: refuse a file that is cut off, empty or in another encoding; off to look at what is left of it.

    Raises:
        RecordError: there is no such file, or it is refused.
        ConfigError: an unknown format, field or column, no such image root, or settings of videos that are out of range.
    """
    from metamorph.data.containers import open_rows

    check_settings("open_source", format, columns or {}, image_root)
    rows = open_rows(path, image_root=None if image_root is None else Path(image_root), name=name, progress=True)
    if whole_files:
        refuse_broken_files(rows)
    _check_columns_of(rows, columns or {})
    roots = Roots(rows.root if image_root is None else Path(image_root), _fetch() if allow_urls else None)
    settings = RecordSettings(
        roots=roots,
        source=name,
        format=format,  # pyright: ignore[reportArgumentType]  # one of FORMATS
        columns=dict(columns or {}),
        needs_answer=needs_answer,
        open_video=VideoOpener(VideoSampling(fps=fps, max_frames=max_frames, damaged_videos=damaged_videos), min_frames),
        seed=seed,
    )
    return FileSource(rows, settings)


def check_settings(function: str, format: str | None, columns: Mapping[str, str], image_root: str | Path | None) -> None:
    """Refuse what cannot be meant before any file is opened.

    Raises:
        ConfigError: an unknown format, a column for none of our fields, or an image root that is no folder.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format {format!r} but one of {', '.join(FORMATS)} is expected ({function}). Correct or drop it.")
    check_columns(columns, function)
    if image_root is not None and not Path(image_root).is_dir():
        found = f"image_root {str(image_root)!r}, which is no folder,"
        raise ConfigError(f"{found} but the one to which paths are relative is needed ({Path(image_root).absolute()}). Check the path.")


def _check_columns_of(rows: Rows, columns: Mapping[str, str]) -> None:
    """Refuse a column that no row has: read as if it were empty, it would leave out all images, say. Of too many rows some are read.

    Raises:
        ConfigError: with the nearest that there is.
    """
    missing, seen = set(columns.values()), dict[str, None]()
    asked = min(len(rows), COMPARED_ROWS)
    for number in range(asked):
        if not missing:
            return
        row = rows.row_or_fault(number * len(rows) // asked)
        if not isinstance(row, Fault):
            seen.update(dict.fromkeys(map(str, row.values)))
            missing -= set(seen)
    if not missing or not seen:
        return
    name = min(missing)
    found = f"columns {', '.join(seen)} but {name!r} is named"
    message = f"{found} (columns of {rows.name}, {asked} rows read). {nearest_column(name, seen)}"
    if asked == len(rows):
        raise ConfigError(message)
    _log.warning("%s", message)  # one of the others may have it; a check of all rows tells


@dataclass(frozen=True)
class VideoOpener:
    """Opens videos as frames at a constant rate, from their start.

    Args:
        sampling: how densely, how many, and what becomes of damaged ones.
        min_frames: fewer are an error.

    Raises:
        ConfigError: a number is out of range.
    """

    sampling: VideoSampling
    min_frames: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.min_frames <= self.sampling.max_frames:
            expected = f"1 to max_frames {self.sampling.max_frames} is needed"
            raise ConfigError(f"min_frames {self.min_frames} but {expected} (videos of a source). Correct it.")

    def __call__(self, video: VideoSource, warn: Report) -> VideoPart:
        """The frames; whatever speaks against a video that can be used is told to `warn`.

        Raises:
            MediaError: it breaks off and is not to be shortened, or gives too few frames.
        """
        sampled = sample_frames(video, self.sampling, min_frames=self.min_frames, warn=warn)
        return VideoPart(tuple(ImagePart(frame) for frame in sampled.frames), self.sampling.fps or sampled.fps)


def _fetch() -> Fetch:
    from metamorph.data.fetch import fetch_image

    return fetch_image
